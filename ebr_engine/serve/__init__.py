"""`ebr-engine serve`: a page, and endpoints that clients speak already, over the files and jobs that commands work on.

`store` keeps jobs and their files, `worker` restores them, `guard` stands before everything that comes in from the network,
`api` and `openai` are the endpoints, `page/` what a browser shows. Needs the extra `serve`.
"""
