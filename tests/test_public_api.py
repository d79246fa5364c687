"""The public names. One that comes or goes is a change that users see: it changes this table and the CHANGELOG."""

import importlib

import pytest

PUBLIC = {
    "mesart.graphs": {
        "Bucket",
        "MesaConfig",
        "BundleError",
        "CapacityError",
        "EngineError",
        "InputError",
        "MesaError",
        "Plan",
        "Span",
        "Stairs",
        "TorchReference",
    },
    "mesart.export": {"build_engines", "export_model", "export_triton_repository"},
    "mesart.evaluation": {
        *("CostResult", "PasskeyResult", "PerplexityResult", "SensitivityResult", "Settings", "SuiteResult"),
        *("ThresholdResult", "TuneResult", "open_systems", "run_cost", "run_passkey", "run_perplexity", "run_suite"),
        *("run_threshold", "sensitivity", "tune"),
    },
    "mesart.runtime": {"ChunkStore", "MesaModel", "SamplingConfig", "backend_names", "present_backends"},
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert len(module.__all__) == len(set(module.__all__))
    assert set(module.__all__) == PUBLIC[package]
    for name in PUBLIC[package]:
        assert getattr(module, name).__name__ == name
        assert getattr(module, name).__doc__, f"{package}.{name} says nothing of itself"


def test_names_that_stay() -> None:
    """As the README and users write them."""
    from mesart.export import build_engines, export_model, export_triton_repository
    from mesart.graphs import MesaConfig, Plan, TorchReference
    from mesart.runtime import MesaModel

    assert callable(export_model)
    assert callable(build_engines)
    assert callable(export_triton_repository)
    assert callable(MesaConfig.from_model)
    assert callable(Plan.of)
    assert callable(TorchReference.prefill)
    assert all(callable(getattr(MesaModel, name)) for name in ("load", "prefill", "step", "generate", "stream"))
    assert all(hasattr(MesaModel, name) for name in ("__enter__", "__exit__"))
