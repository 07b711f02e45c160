"""A small problem that every application can be asked about."""

import pytest
from problems import blobs, network


@pytest.fixture(params=[1, 3], ids=["k=1", "k=3"])
def problem(request):
    """(model, train, val) with 40 training samples."""
    k = request.param
    x, y = blobs(70, max(k, 2))
    return network(k), (x[:40], y[:40]), (x[40:], y[40:])
