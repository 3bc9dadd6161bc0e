"""HTTP/1.1 on raw protocols, for the byte path: a server for clients and a client for engines. Knows no OpenAI."""
