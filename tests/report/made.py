"""Scores for the tests of the report, and text that tries to break out of it."""

import numpy as np

from sui_fast import Scores

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "' onmouseover='window.hacked = 1",
    "<!--<script>",
    "]]>\u2028\u2029\x00\ufeff\r\n",
    "\ud800 lone",
    "=cmd|' /C calc'!A0",
    'a,b"c\nd',
    "javascript:window.hacked=1",
    "${7*7}{{7*7}}$title",
    "&lt;b&gt;&amp;",
]


def make_scores(n=60, seed=0, inputs="images", **more):
    """Scores with every measure, some wrong labels, ids of their own."""
    rng = np.random.default_rng(seed)
    values = {"si": rng.random(n) ** 4 * 1e-3, "fsi": rng.random(n) ** 6 * 1e-5, "loo_margin": rng.normal(0.5, 0.5, n)}
    values["fsi"][0] = 0.0
    labels = rng.integers(0, 3, n)
    given = {
        "images": {"inputs": rng.random((n, 1, 8, 8))},
        "rows": {"inputs": rng.normal(size=(n, 5))},
        "texts": {"texts": [f"sample number {i}, {'apple' if i % 7 == 0 else 'pear'} tree" for i in range(n)]},
    }[inputs]
    suggested = np.where(values["loo_margin"] < 0, (labels + 1) % 3, labels)
    more = {"labels": labels, "suggested": suggested, **given, **more}
    ids = more.pop("ids", 100 + np.arange(n))
    details = {"method": "dense", "coverage": 1.0, "seconds": {"kernel": 1.0}}
    units = {"si": "nats", "fsi": "nats", "loo_margin": "units of the targets"}
    return Scores(ids, values, more.pop("settings", {"reg": 0.1}), details, units=units, **more)
