"""Runs the publish command, and the part of it that talks to the Hub, against a loopback Hub."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from forking import Finished, ForkServer, Process
from hub_server import HubServer

from bilinear_tc.train.run import Run
from bilinear_tc.upload import publish
from bilinear_tc.upload.hub import HubRepository
from bilinear_tc.upload.local_files import list_files


class Publisher:
    """Publishes to one loopback Hub from forked processes whose HF_HOME is `home`; `variables` join their environment.

    A token of "" is none.
    """

    def __init__(
        self, server: ForkServer, hub: HubServer, home: Path, token: str | None = None, **variables: str
    ) -> None:
        self.server, self.hub, self.home = server, hub, home
        self.environment = hub.environment(home, token=hub.token if token is None else token) | variables

    def command(self, run: Path, *flags: str) -> Finished:
        """`python upload/publish.py RUN flags`."""
        return self.server.start(publish.main, [run, *flags], environment=self.environment).wait()

    def start_sending(self, run: Path, settings: publish.Publication) -> Process:
        """Begins with the part of the command that talks to the Hub, with RUN/repository as it is and short pauses."""
        arguments = [run, json.dumps(dataclasses.asdict(settings))]
        return self.server.start(send, arguments, environment=self.environment)

    def send(self, run: Path, settings: publish.Publication) -> Finished:
        return self.start_sending(run, settings).wait()


def send() -> None:
    """All that the command asks of the Hub, from when it has built the folder; its arguments are RUN and settings."""
    run, settings = Path(sys.argv[1]), publish.Publication(**json.loads(sys.argv[2]))
    keep_layers = settings.allow_partial and not settings.overwrite
    hub = HubRepository(settings.repo_id, settings.revision, keep_layers=keep_layers, first_wait=0.02)
    hub.check_token()
    publish.send(hub, settings, Run(run), list_files(run / publish.FOLDER))
