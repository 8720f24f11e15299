"""Files in, files out: what the command, a server and a cluster share; it knows nothing of a terminal."""
