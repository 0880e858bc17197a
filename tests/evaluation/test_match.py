"""Genes of sets that name them differently."""

import pandas as pd

from wbdit.evaluation.match import gene_names

SYMBOLS = ["CD3D", "NKG7", "MS4A1", "LYZ"]
IDS = ["ENSG00000167286", "ENSG00000105374", "ENSG00000156738", "ENSG00000090382"]


def table(index, **columns):
    return pd.DataFrame(columns, index=index)


def test_common_names_are_left_alone():
    notes = []
    tables = {"real": table(SYMBOLS, gene_ids=IDS), "synthetic": table(SYMBOLS[:2])}
    assert gene_names(tables, notes)["synthetic"].tolist() == SYMBOLS[:2]
    assert not notes


def test_ids_of_one_set_meet_a_column_of_the_other():
    notes = []
    names = gene_names({"real": table(IDS), "synthetic": table(SYMBOLS, feature_id=IDS[::-1])}, notes)
    assert names["real"].tolist() == IDS
    assert names["synthetic"].tolist() == IDS[::-1]
    assert notes == ['genes are matched by var["feature_id"] of the synthetic cells']


def test_columns_of_both_sets_can_meet():
    notes = []
    numbers = [f"row-{i}" for i in range(4)]
    tables = {
        "real": table(numbers, gene_name=SYMBOLS),
        "synthetic": table(IDS, symbol=SYMBOLS),
        "train": table(SYMBOLS),
    }
    names = gene_names(tables, notes)
    assert [index.tolist() for index in names.values()] == [SYMBOLS] * 3
    assert "gene_name" in notes[0]
    assert "symbol" in notes[0]


def test_versions_of_ids_do_not_matter():
    notes = []
    names = gene_names({"real": table([f"{x}.{i + 1}" for i, x in enumerate(IDS)]), "synthetic": table(IDS)}, notes)
    assert names["real"].tolist() == IDS
    assert notes == ["genes are matched by their Ensembl ids, without versions"]


def test_a_repeated_symbol_belongs_to_its_first_gene():
    names = gene_names({"real": table(IDS, symbol=["A", "B", "C", "C"]), "synthetic": table(["A", "B", "C", "D"])}, [])
    assert names["real"].is_unique


def test_numbers_and_groups_are_no_names():
    tables = {
        "real": table(IDS, mean=[1.0, 2.0, 3.0, 4.0], chromosome=["1", "1", "2", "2"]),
        "synthetic": table(SYMBOLS),
    }
    assert gene_names(tables, [])["real"].tolist() == IDS
