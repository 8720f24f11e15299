"""The method's claims at small scale, on the frozen `mini`: one module an experiment, each resumable, all on real photos."""
