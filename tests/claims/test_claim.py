"""Claims are checked when they are made, long before a run."""

import dataclasses

import pytest

from bn_research.claims.claim import Claim, check_unique

TEXTS = {
    "id": "no-training-without-bn",
    "statement": "Without BN it does not train.",
    "source": "Notes",
    "criterion": "Reproduced if the loss stays at ln 10; not reproduced if it falls.",
    "expected": "loss = ln 10",
}


def test_claim_keeps_its_texts_and_cannot_be_changed():
    claim = Claim(**TEXTS)
    assert dataclasses.asdict(claim) == TEXTS
    with pytest.raises(dataclasses.FrozenInstanceError):
        claim.criterion = "whatever came out"


@pytest.mark.parametrize("field", TEXTS)
@pytest.mark.parametrize("value", ["", " \n", None, 3])
def test_empty_or_missing_text_is_refused_by_name_and_value(field, value):
    with pytest.raises(ValueError) as error:
        Claim(**(TEXTS | {field: value}))
    assert f"Claim.{field} " in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("slug", ["a", "fewer-steps-x30", "a1-2"])
def test_slugs(slug):
    assert Claim(**(TEXTS | {"id": slug})).id == slug


@pytest.mark.parametrize("slug", ["Upper", "a_b", "a--b", "-a", "a-", "1a", "a b", "a\n", "é"])
def test_other_ids_are_refused(slug):
    with pytest.raises(ValueError, match=r"Claim\.id must be lower-case"):
        Claim(**(TEXTS | {"id": slug}))


def test_ids_must_be_unique():
    claim = Claim(**TEXTS)
    other = dataclasses.replace(claim, id="other")
    check_unique([claim, other])
    with pytest.raises(ValueError, match="'no-training-without-bn' more than once"):
        check_unique([claim, other, claim])
