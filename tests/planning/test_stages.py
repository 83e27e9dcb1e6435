from launcher.planning.layout import Layout
from launcher.planning.stages import pipeline_stages

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def test_embedding_and_head_weigh_in_parameters_and_only_the_head_in_time() -> None:
    layout = Layout(world_size=2, data_parallel_size=1, pipeline_parallel_size=2)
    assert pipeline_stages(CONFIG, layout, "parameters", 128) == (0, 4, 8)
    assert pipeline_stages(CONFIG, layout, "time", 128) == (0, 5, 8)


def test_an_untied_embedding_is_whole_on_tensor_parallel_ranks() -> None:
    wide = {**CONFIG, "vocab_size": 4000}
    layout = Layout(world_size=8, data_parallel_size=1, pipeline_parallel_size=2, tensor_parallel_size=4)
    one = layout.model_copy(update={"world_size": 2, "tensor_parallel_size": 1})
    assert pipeline_stages(wide, one, "parameters", 128) == (0, 4, 8)
    assert pipeline_stages(wide, layout, "parameters", 128) == (0, 1, 8)
