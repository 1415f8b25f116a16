"""Retention keeps what it promises, whatever there is."""

from hypothesis import given
from hypothesis import strategies as st

from dist_ft.train.retention import Kept, Retention

SCORES = st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 5).map(float))
FOUND = st.lists(
    st.builds(Kept, st.integers(1, 60), st.booleans(), SCORES),
    min_size=1,
    unique_by=lambda k: k.step,
)
RULES = st.builds(
    Retention, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 20)), st.booleans()
)


@given(FOUND, RULES, st.data())
def test_the_promises_hold(found: list[Kept], rules: Retention, data: st.DataObject) -> None:
    newest = data.draw(st.sampled_from([kept.step for kept in found]))
    keep = rules.keeps(found, newest=newest)
    own = [kept for kept in found if kept.step <= newest]
    regular = sorted(kept.step for kept in own if not kept.ephemeral)
    assert newest in keep
    assert keep <= {kept.step for kept in own}
    assert set(regular[-rules.keep_last :]) <= keep
    if rules.keep_every:
        assert {step for step in regular if step % rules.keep_every == 0} <= keep
    if rules.keep_best:
        for task in ("a", "b"):
            scored = {kept.step: kept.scores[task] for kept in own if task in kept.scores}
            if scored:
                assert any(scored[s] == max(scored.values()) for s in keep & set(scored))
    # Nothing else: an old ephemeral one stays for no reason but a score.
    for kept in own:
        if kept.ephemeral and kept.step < newest and not (rules.keep_best and kept.scores):
            assert kept.step not in keep
