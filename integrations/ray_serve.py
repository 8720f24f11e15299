"""The server on Ray Serve, which keeps it running on a cluster and starts it anew when it dies.

    pip install 'ebr-engine[serve]' 'ray[serve]'
    STORE=/shared/ebr serve run integrations.ray_serve:app

One replica: a job lies in the queue and the store of the replica that took it, where its client asks for it again. The store has
to be a folder that every node sees, so that what was accepted survives a node.
"""

import os
from pathlib import Path

from ray import serve


def server():
    """The application, made in the replica, with its model."""
    from ebr_engine import Restorer
    from ebr_engine.serve.app import make_app
    from ebr_engine.serve.hub import Hub
    from ebr_engine.serve.settings import Settings

    return make_app(Hub(Settings(store=Path(os.environ["STORE"])), Restorer("mini")))


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1})
@serve.ingress(server)
class Server:
    """What the ingress answers for."""


app = Server.bind()
