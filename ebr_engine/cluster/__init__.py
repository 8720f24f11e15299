"""Many workers on Ray (extra `cluster`): a driver finds, joins and writes; workers hold a loaded model and compute.

`connect` finds a cluster, `pool` keeps workers busy and makes good for those that die, `worker` is what runs in one, `fleet` is
a restorer whose work is done by a pool, and `run` drives the files of `ebr-engine restore` over it. Only `connect` and `pool`
import Ray, when they are called.
"""
