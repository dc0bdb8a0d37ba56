"""What one would use instead, each in a file that says what it stands for and its source.

Layer peers take and give what `citi_kernels.molora_linear` does, where they can compute it.
"""
