"""What this package costs on this machine, beside what one would use instead: `citi bench`."""
