"""Collectives, reshard, shard_map and sharded init on real ranks."""

from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.small import MESHES


def test_every_collective_has_its_exact_transpose(ranks: Ranks) -> None:
    errors = ranks.run("tests.cases.collectives:transposes", 8)
    assert len(errors) == 15
    assert max(errors.values()) < 1e-12, errors


def test_what_one_rank_cannot_do_none_does(ranks: Ranks) -> None:
    assert ranks.run("tests.cases.collectives:agreeing", 2) == [True, False, False, False]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_reshard_between_random_layouts(ranks: Ranks, world: int) -> None:
    assert ranks.run("tests.cases.collectives:resharding", world, count=40, seed=world) == 40


def test_shard_map(ranks: Ranks) -> None:
    assert "layout says" in ranks.run("tests.cases.collectives:round_trip_of_shard_map", 4)["refusal"]


@pytest.mark.parametrize("worlds", ["largest", pytest.param("all", marks=pytest.mark.slow)])
def test_init_is_bitwise_the_same_on_every_mesh(ranks: Ranks, tmp_path: Path, worlds: str) -> None:
    path = str(tmp_path / "init.safetensors")
    assert ranks.run("tests.cases.collectives:init_bits", 1, path=path, table="single", world=1)
    for table, meshes in MESHES.items():
        for world in meshes if worlds == "all" else (max(meshes),):
            assert ranks.run("tests.cases.collectives:init_bits", world, path=path, table=table, world=world), (table, world)


def test_each_rank_holds_only_its_part(ranks: Ranks) -> None:
    fsdp = ranks.run("tests.cases.collectives:local_shapes", 8, table="fsdp", world=8)
    assert fsdp["layers.query.weight"] == [2, 4, 8, 4]  # embed 32 over 8
    assert fsdp["embed.weight"] == [250, 4]
    both = ranks.run("tests.cases.collectives:local_shapes", 8, table="fsdp_tensor", world=8)
    assert both["layers.query.weight"] == [2, 16, 2, 4]  # embed 32 over fsdp 2, heads 8 over tensor 4
    assert both["layers.key.weight"] == [2, 16, 2, 4]  # two key heads do not divide by 4: whole
    assert both["layers.up.weight"] == [2, 16, 12]
    assert both["embed.weight"] == [63, 16]  # 250 rows in chunks of 63: padded in compute alone
