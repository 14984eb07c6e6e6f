"""The figures of an evaluation on spatial arrays."""

from __future__ import annotations

from pathlib import Path

import pytest

from einsumcascade.analysis.spatial.evaluation import Evaluation
from einsumcascade.analysis.spatial.model import model
from einsumcascade.errors import InputError
from einsumcascade.report.model_plots import plot_evaluation


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Evaluate two models at two lengths."""
    pytest.importorskip("matplotlib")
    return model(workloads=["BERT", "XLM"], lengths=[1024, 4096])


def test_each_table_has_a_figure_with_its_names(evaluation: Evaluation, tmp_path: Path) -> None:
    files = plot_evaluation(evaluation, tmp_path / "new" / "figures")
    names = ["shares", "utilisation-2d", "utilisation-1d", "breakdown", "attention", "end-to-end", "traffic", "sizes"]
    assert [f.name for f in files] == [f"{n}.svg" for n in names]
    assert all(f.stat().st_size > 1000 for f in files)


def test_the_same_tables_give_the_same_files(evaluation: Evaluation, tmp_path: Path) -> None:
    first, second = (plot_evaluation(evaluation, tmp_path / n) for n in ("a", "b"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_figures_are_drawn_as_pixels_too(evaluation: Evaluation, tmp_path: Path) -> None:
    files = plot_evaluation(evaluation, tmp_path, suffix="png")
    assert {f.read_bytes()[:8] for f in files} == {b"\x89PNG\r\n\x1a\n"}


def test_a_folder_that_cannot_be_made_is_named(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"output-file.*taken"):
        plot_evaluation(evaluation, tmp_path / "taken" / "figures")
