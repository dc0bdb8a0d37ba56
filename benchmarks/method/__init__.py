"""The method against what it is compared with: one row a method, one command for all.

::

    python -m benchmarks.method --scale cpu --data FOLDER       every row, resumable
    python -m benchmarks.method.leaks FOLDER                    the leak check alone
    cp runs/method/cpu/results/*.json benchmarks/results/method/
    python -m benchmarks.method.results_table                   RESULTS.md from committed results

A row is a file in rows/: how it trains, on what, at which rates. Every trained row takes the same
number of optimizer steps on the same number of tokens, and the same data where its data is the mix.
"""
