"""The Python client: :class:`AsyncClient`, and :class:`Client`, which blocks; same namespaces, same methods."""

from helmr.client.aio import AsyncClient
from helmr.client.runs import RunHandle
from helmr.client.sync import Client

__all__ = ["AsyncClient", "Client", "RunHandle"]
