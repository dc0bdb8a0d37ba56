"""`python -m benchmarks.method`."""

from benchmarks.method.run import main

if __name__ == "__main__":
    main()
