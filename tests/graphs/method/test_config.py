"""MesaConfig: the rule for fields left out, and every combination that it refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesart.graphs import MesaConfig, MesaError


@given(st.integers(16, 200_000))
def test_rule_for_fields_left_out(train_length):
    config = MesaConfig(train_length)
    assert config.head_length == min(128, train_length * 5 // 32)
    assert config.chunk_length == min(1024, train_length // 2)
    assert config.tail_min == min(512, train_length * 3 // 16)
    assert config.tail_max == 512
    assert config.linear_window == min(512, train_length // 8)
    assert (config.stair_width, config.log_n, config.rho) == (None, True, 0.5)


def test_given_fields_are_kept():
    config = MesaConfig(256, head_length=24, linear_window=23, log_n=False)
    assert (config.head_length, config.linear_window, config.log_n) == (24, 23, False)
    assert config.chunk_length == 128


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({"train_length": 15}, "at least 16"),
        ({"head_length": 0}, "head_length is 0; it must be at least 1"),
        ({"chunk_length": 0}, "chunk_length is 0; it must be at least 1"),
        ({"tail_min": -2}, "tail_min is -2; it must be at least 1"),
        ({"tail_max": 0}, "tail_max is 0; it must be at least 1"),
        ({"tail_min": 30, "tail_max": 29}, "tail_max = 29 is less than tail_min = 30; raise it, or lower tail_min"),
        ({"linear_window": -5}, "linear_window is -5; it must be at least 1"),
        ({"stair_width": 0}, "stair_width is 0; it must be at least 1"),
        ({"head_length": 60, "chunk_length": 200}, "lower one of them by 4"),
        ({"linear_window": 128}, "lower linear_window or raise rho"),
        ({"rho": 0.0}, "lower linear_window or raise rho"),
        ({"tail_min": 129}, "lower tail_min or rho"),
        ({"rho": 0.9}, "lower tail_min or rho"),
        ({"short_length": -1}, "it must be at least 0"),
        ({"short_length": 256}, "it must be at most 255"),
    ],
)
def test_invalid_combinations_are_refused(fields, way_out):
    with pytest.raises(MesaError) as error:
        MesaConfig(**{"train_length": 256, **fields})
    assert way_out in str(error.value)
    assert "\n" not in str(error.value)


def test_head_and_chunk_may_fill_the_window():
    assert MesaConfig(256, head_length=56, chunk_length=200).chunk_length == 200


@given(st.integers(300, 10**7))
def test_fitting_width_is_the_smallest_that_keeps_to_the_stair_range(tokens):
    config = MesaConfig(256)
    stairs, room = tokens - config.linear_window, config.stair_range - config.linear_window
    width = config.fitting_width(tokens)
    assert -(-stairs // width) <= room
    assert width == 1 or -(-stairs // (width - 1)) > room


def test_a_fixed_width_serves_all_lengths():
    config = MesaConfig(256, stair_width=10)
    assert {config.width_for(tokens) for tokens in (300, 3000, 300_000)} == {10}


def test_dict_round_trip():
    config = MesaConfig(256, head_length=24, stair_width=10, log_n=False)
    assert MesaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_refused():
    with pytest.raises(MesaError, match=r"unknown configuration field 'window'; known are .*linear_window"):
        MesaConfig.from_dict({"train_length": 256, "window": 3})


class TestFromModel:
    @pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len", "seq_length"])
    def test_reads_the_trained_length(self, tmp_path, name):
        (tmp_path / "config.json").write_text(json.dumps({name: 512}))
        assert MesaConfig.from_model(tmp_path) == MesaConfig(512)
        assert MesaConfig.from_model(str(tmp_path)) == MesaConfig(512)

    def test_reads_the_text_part_of_a_multimodal_config(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"max_position_embeddings": 512}}))
        assert MesaConfig.from_model(tmp_path).train_length == 512

    def test_of_a_model_in_memory(self, make_model):
        assert MesaConfig.from_model(make_model("tied_llama")) == MesaConfig(64)

    def test_fields_override_the_rule(self, tmp_path):
        (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
        config = MesaConfig.from_model(tmp_path, train_length=256, head_length=24, chunk_length=None)
        assert config == MesaConfig(256, head_length=24)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "holds no config.json; give a transformers checkpoint folder"),
            ("{", "is not valid JSON"),
            ('{"hidden_size": 3}', "pass train_length"),
        ],
    )
    def test_unusable_folder(self, tmp_path, content, says):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(MesaError) as error:
            MesaConfig.from_model(tmp_path)
        assert says in str(error.value)
        assert "\n" not in str(error.value)

    def test_neither_folder_nor_hub_id(self):
        with pytest.raises(MesaError, match="neither a checkpoint folder nor a hub id") as error:
            MesaConfig.from_model("nobody/nothing")
        assert "\n" not in str(error.value)
