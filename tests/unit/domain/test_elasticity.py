"""On how many workers a job may run. A failure means a world that is not exact, or a wish that is misheard."""

import pytest

from service.domain.elasticity import exact_worlds, resize_problem
from service.domain.spec import parse_spec


def _spec(**changes):
    return parse_spec(
        {
            "name": "elastic",
            "model": {"factory": "builtin:mlp"},
            "dataset": {"factory": "builtin:digits"},
            "batch": {"size": 16},
            "steps": 10,
            **changes,
        }
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 3},
        {"workers": {"min": 1, "max": 6}},
        {"workers": {"min": 1, "max": 6}, "batch": {"size": 16, "max_per_rank": 6}},
        {"workers": {"min": 1, "max": 20}},
        {"workers": {"min": 1, "max": 20}, "batch": {"size": 16, "drop_last": False}},
        {
            "workers": {"min": 1, "max": 20},
            "batch": {"size": 16, "memory_bytes_per_sample": 2**20},
            "resources": {"memory_bytes_per_rank": 2**22},
        },
    ],
    ids=str,
)
def test_the_worlds_are_those_of_the_specification(changes):
    spec = _spec(**changes)
    assert exact_worlds(spec) == spec.exact_worlds()
    assert exact_worlds(_spec(**changes)) == spec.exact_worlds(), "asked again, of an equal one"


def test_jobs_whose_worlds_differ_are_told_apart():
    by_tail = [
        _spec(workers={"min": 1, "max": 20}, batch={"size": 16, "drop_last": drop_last}) for drop_last in (True, False)
    ]
    assert exact_worlds(by_tail[0]) != exact_worlds(by_tail[1])


def test_a_number_of_workers_is_refused_with_those_that_do():
    elastic = _spec(workers={"min": 2, "max": 20})
    assert resize_problem(elastic, 16) is None
    assert "Use one of 16, 15, " in resize_problem(elastic, 17).message
    assert "not within the workers of the job, 2 to 20" in resize_problem(elastic, 1).message
    assert "cannot compute the job's batches exactly" in resize_problem(elastic, 20).message
    fixed = _spec(workers=3)
    assert resize_problem(fixed, 3) is None
    assert "submitted for 3 worker(s)" in resize_problem(fixed, 2).message
    assert {resize_problem(spec, 21).field for spec in (elastic, fixed)} == {"workers"}
