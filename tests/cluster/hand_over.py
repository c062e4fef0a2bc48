"""A learner rank whose direct transfer is a call with the tensors in it, in two parts: all of `nccl` and `ipc` but vLLM's transport."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from webdancer.cluster.engine_client import EngineClient
from webdancer.cluster.learner_actor import LearnerActor
from webdancer.inference.checksum import checksum, numbers


class HandOver(LearnerActor):
    def connect_engines(self, workers, *, backend, address, port, ranks_per_engine, timeout_s):
        client = EngineClient(workers, ranks_per_engine=ranks_per_engine, timeout_s=timeout_s)
        client.init_weight_transfer_engine({"rank_offset": 1, "master_address": address, "master_port": port})
        self._source = SimpleNamespace(checksums=lambda: numbers(self._sums))
        self._sender = SimpleNamespace(send_weights=functools.partial(self._send, client), shutdown=lambda: None)

    def _send(self, client):
        specs, tensors = self._rank.tensor_specs(), list(self._rank.gathered_weights())
        assert [(name, (tuple(tensor.shape), str(tensor.dtype)[6:])) for name, tensor in tensors] == list(specs.items())
        self._sums = {name: checksum(tensor) for name, tensor in tensors}
        client.start_weight_update()
        for part in (tensors[:3], tensors[3:]):
            client.update_weights({"tensors": dict(part)})
        client.finish_weight_update()
