"""Real vLLM engines behind our proxy: `make conformance-vllm`. In an environment of its own; not for pytest.

install.sh      makes that environment
engine          a vLLM server as a child process
checks          what a fleet must do, each one a coroutine that raises AssertionError
fleets          which engines stand behind which proxy, and which checks they get
__main__        runs the fleets one after the other, prints the table
"""
