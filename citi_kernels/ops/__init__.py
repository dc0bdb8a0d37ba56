"""One file per operation: definition, checks, op, autograd, backends."""
