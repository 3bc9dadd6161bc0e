"""What `python -m bench.simulate --scenario NAME` can run, one file each."""
