"""The demo's task: split over parties, learnable only from its owner, the same from the same seed."""

from __future__ import annotations

from itertools import islice

import pytest

from fedllm.data.adverts import (
    DEMO,
    PRODUCTS,
    SENTENCES,
    VALUES,
    AdvertTask,
    advert,
    common_test,
    party_examples,
    pretraining_examples,
    products_of,
    prompt,
)

SMALL = AdvertTask(seed=3, train_per_product=30, test_per_product=5)


def _product(text: str) -> str:
    return text.split("*")[0].removeprefix("type#")


@pytest.mark.parametrize("num_parties", range(1, 9))
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_product_belongs_to_exactly_one_party(num_parties: int, shuffle: bool) -> None:
    owned = products_of(AdvertTask(seed=5, num_parties=num_parties, shuffle_products=shuffle))
    assert sorted(PRODUCTS) == sorted(product for products in owned.values() for product in products)
    assert len(owned) == num_parties and all(owned.values())


def test_a_party_trains_on_its_own_products_only() -> None:
    for party, records in party_examples(SMALL).items():
        assert set(products_of(SMALL)[party]) == {_product(record["prompt"]) for record in records}


def test_parties_differ_in_size() -> None:
    sizes = [len(records) for records in party_examples(AdvertTask(seed=1, num_parties=4)).values()]
    assert sorted(set(sizes), reverse=True) == sizes


@pytest.mark.parametrize("seed", range(3))
def test_no_party_trains_on_a_test_input(seed: int) -> None:
    task = AdvertTask(seed=seed)
    trained = {record["prompt"] for records in party_examples(task).values() for record in records}
    tested = [record["prompt"] for record in common_test(task)]
    assert len(set(tested)) == len(tested) == task.test_per_product * len(PRODUCTS)
    assert not trained & set(tested)


def test_the_test_set_holds_every_product_equally_often() -> None:
    products = [_product(record["prompt"]) for record in common_test(SMALL)]
    assert [SMALL.test_per_product] * len(PRODUCTS) == [products.count(product) for product in PRODUCTS]


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    again = AdvertTask(seed=3, train_per_product=30, test_per_product=5)
    other = AdvertTask(seed=4, train_per_product=30, test_per_product=5)
    assert party_examples(SMALL) == party_examples(again)
    assert common_test(SMALL) == common_test(again)
    assert common_test(SMALL) != common_test(other)


def test_an_advert_carries_every_value_of_its_input() -> None:
    for record in common_test(SMALL):
        for pair in record["prompt"].strip().split("*"):
            assert pair.split("#")[1] in record["completion"]


def test_house_style_depends_on_the_seed_and_the_product_only_through_their_hash() -> None:
    attributes = {"color": "red", "material": "silk"}
    texts = {advert(AdvertTask(seed=seed), product, attributes) for seed in range(3) for product in PRODUCTS}
    assert len(texts) > 20
    assert advert(DEMO, "sofa", attributes) == advert(DEMO, "sofa", dict(attributes))


def test_noise_is_the_chance_of_a_sentence_off_house_style() -> None:
    quiet = AdvertTask(seed=3, train_per_product=30, noise=0.0)
    for records in party_examples(quiet).values():
        for record in records:
            attributes = dict(pair.split("#") for pair in record["prompt"].strip().split("*"))
            assert advert(quiet, attributes.pop("type"), attributes) == record["completion"]
    noisy = AdvertTask(seed=3, train_per_product=30, noise=1.0)
    assert party_examples(noisy) != party_examples(quiet)


def test_pretraining_shows_no_advert_of_a_partys_product() -> None:
    records = list(islice(pretraining_examples(1), 500))
    assert not [record for record in records if _product(record["prompt"]) in PRODUCTS]
    assert records == list(islice(pretraining_examples(1), 500))
    assert records != list(islice(pretraining_examples(1, "validation"), 500))


def test_every_sentence_has_a_place_for_the_value_the_verb_and_the_benefit() -> None:
    assert set(SENTENCES) == set(VALUES)
    for sentences in SENTENCES.values():
        for sentence in sentences:
            assert all(name in sentence for name in ("{value}", "{verb}", "{benefit}"))


def test_a_prompt_ends_where_the_advertisement_starts() -> None:
    assert prompt("lamp", {"color": "red", "use": "work"}) == "type#lamp*color#red*use#work\n"


@pytest.mark.parametrize("num_parties", [0, 9])
def test_more_parties_than_products_are_refused(num_parties: int) -> None:
    with pytest.raises(ValueError, match="choose 1 to 8"):
        AdvertTask(num_parties=num_parties)
