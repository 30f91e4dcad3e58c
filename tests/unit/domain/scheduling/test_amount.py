"""Amounts as tuples. A failure means that the policy counts otherwise than placement does."""

from hypothesis import given
from hypothesis import strategies as st

from service.domain.placement import Resources
from service.domain.scheduling.amount import amount_of, dominant_share, holds

_amounts = st.builds(
    Resources,
    cpus=st.integers(-20, 80).map(lambda tenths: tenths / 10),
    gpus=st.integers(-4, 8),
    memory_bytes=st.integers(-(2**31), 2**40),
)
_per_rank = st.builds(
    Resources,
    cpus=st.integers(0, 40).map(lambda tenths: tenths / 10),
    gpus=st.integers(0, 2),
    memory_bytes=st.sampled_from([0, 2**20, 2**30 + 1]),
)


@given(free=_amounts, per_rank=_per_rank)
def test_as_many_ranks_fit_as_resources_say(free, per_rank):
    assert holds(amount_of(free), amount_of(per_rank)) == free.holds(per_rank)


def test_the_dominant_share_is_the_largest():
    assert dominant_share((4.0, 1, 2**30), (16.0, 2, 2**40)) == 0.5
    assert dominant_share((4.0, 0, 0), (16.0, 0, 2**40)) == 0.25
