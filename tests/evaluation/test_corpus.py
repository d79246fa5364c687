"""The standard library as text, split by file."""

from mesart.evaluation.corpus import is_held_out, library_documents, library_text


def test_splits_are_disjoint_and_held_out_is_about_a_sixteenth() -> None:
    train, held_out = library_documents("train"), library_documents("held_out")
    assert not set(train) & set(held_out)
    assert 1 / 32 < len(held_out) / (len(train) + len(held_out)) < 1 / 8


def test_order_and_split_do_not_depend_on_the_machine() -> None:
    assert library_documents("held_out") == library_documents("held_out")
    assert is_held_out("argparse.py") is is_held_out("argparse.py")
    assert "\n\n".join(library_documents("held_out")) == library_text("held_out")
