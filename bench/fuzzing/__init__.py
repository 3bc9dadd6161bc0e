"""What `bench.fuzz` is made of: a grammar of nearly right inputs, mutations of them, and the parts that read them."""
