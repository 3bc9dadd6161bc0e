"""Real SGLang servers behind our proxy: `make conformance-sglang`. In environments of their own; not for pytest.

install.sh       makes one environment per version
sitecustomize    what SGLang needs there to run without its kernels
server           an encoder or a language-only server as a child process
checks           what a fleet must do, each one a coroutine that raises AssertionError
__main__         runs both versions, prints the table
"""
