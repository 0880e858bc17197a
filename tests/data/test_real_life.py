"""Cells as people have them: which matrix is read and how, or the one line that says what to do.

`docs/guide.md` has the same table in the user's words.
"""

import json
import subprocess
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import exit_code

import wbdit
from wbdit import InputError
from wbdit.checkpoint import read_preprocessor, write_preprocessor
from wbdit.cli import _parse_per_label
from wbdit.data.cell_matrix import MemoryMatrix
from wbdit.data.matrix import Source
from wbdit.data.preprocessor import Preprocessor
from wbdit.data.sources import TrainingData
from wbdit.data.variable_genes import variable_genes
from wbdit.evaluation.align import align

RNG = np.random.default_rng(0)
N, G = 60, 80
COUNTS = RNG.poisson(RNG.gamma(0.3, 3.0, G) * RNG.lognormal(0, 0.5, (N, 1))).astype(np.float32)
COUNTS[COUNTS.sum(1) == 0, 0] = 1
TOTALS = COUNTS.sum(1, keepdims=True)
OTHER = RNG.poisson(1.0, COUNTS.shape).astype(np.float32)
CP10K = COUNTS / TOTALS * 1e4
LOG = np.log1p(CP10K)
SCALED = (LOG - LOG.mean(0)) / (LOG.std(0) + 1e-6)
SOUP = np.where(RNG.random(COUNTS.shape) < 0.5, COUNTS, COUNTS * RNG.uniform(0.3, 1, COUNTS.shape))
DECONTX = COUNTS * RNG.beta(8, 3, COUNTS.shape)
RSEM = np.where(RNG.random(COUNTS.shape) < 0.8, COUNTS, COUNTS + RNG.random(COUNTS.shape).round(2))
IMPUTED = LOG @ RNG.dirichlet(np.ones(G), G)


def cells(X=COUNTS, raw=None, more_genes=0, /, **layers):
    """Return cells with these values; raw may have more genes than X."""
    adata = ad.AnnData(X if X is None or sp.issparse(X) else np.asarray(X), shape=(N, G) if X is None else None)
    adata.obs_names = [f"cell-{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"gene-{i}" for i in range(adata.n_vars)]
    adata.obs["type"] = pd.Categorical(np.array(["B", "NK", "T"])[np.arange(adata.n_obs) % 3])
    if raw is not None:
        raw = np.hstack([raw, OTHER[:, :more_genes]])
        adata.raw = ad.AnnData(raw, obs=adata.obs, var=pd.DataFrame(index=[f"gene-{i}" for i in range(raw.shape[1])]))
    for name, values in layers.items():
        adata.layers[name] = np.asarray(values)
    return adata


def named(names):
    adata = cells()
    adata.var_names = names
    return adata


def with_obs(**columns):
    adata = cells()
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def backed(tmp_path):
    path = tmp_path / "backed.h5ad"
    cells(sp.csr_matrix(COUNTS)).write_h5ad(path)
    return ad.read_h5ad(path, backed="r")


def unsummed():
    """Return a CSR matrix that stores some entries in two parts."""
    X = sp.csr_matrix(COUNTS)
    split = sp.csr_matrix(
        (np.repeat(X.data / 2, 2), np.repeat(X.indices, 2), 2 * X.indptr), shape=X.shape, dtype=np.float32
    )
    assert not split.has_canonical_format
    return split


ROUND, LOGNORM_SAID = Source(round_counts=True), Source(space="lognorm")
DIFFERENT = "hold different counts"
READ = [  # cells, choice, matrix, space, values that are read
    ("raw counts", cells(), None, "X", "counts", COUNTS),
    ("10x file: csr int64", cells(sp.csr_matrix(COUNTS.astype(np.int64))), None, "X", "counts", COUNTS),
    ("csc uint64", cells(sp.csc_matrix(COUNTS.astype(np.uint64))), None, "X", "counts", COUNTS),
    ("float64 counts", cells(COUNTS.astype(np.float64)), None, "X", "counts", COUNTS),
    ("uint8 counts", cells(COUNTS.astype(np.uint8)), None, "X", "counts", COUNTS),
    ("csr with entries in two parts", cells(unsummed()), None, "X", "counts", COUNTS),
    ("zeros and ones", cells(np.sign(COUNTS)), None, "X", "counts", np.sign(COUNTS)),
    ("CELLxGENE: counts in raw.X", cells(LOG, COUNTS), None, "raw.X", "counts", COUNTS),
    ("raw has more genes", cells(LOG, COUNTS, 9), None, "raw.X", "counts", np.hstack([COUNTS, OTHER[:, :9]])),
    ("scanpy: layers['counts']", cells(LOG, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("layers['raw_counts']", cells(LOG, raw_counts=COUNTS), None, "layers['raw_counts']", "counts", COUNTS),
    ("scaled X, log raw, counts", cells(SCALED, LOG, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("the same counts twice", cells(LOG, COUNTS, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("X is missing", cells(None, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("X has NaN, a layer counts", cells(LOG * np.nan, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("X is CPM, a layer counts", cells(CP10K, counts=COUNTS), None, "layers['counts']", "counts", COUNTS),
    ("velocyto: X is counts", cells(COUNTS, spliced=OTHER, unspliced=COUNTS - 0), None, "X", "counts", COUNTS),
    (
        "scVelo with counts",
        cells(LOG, counts=COUNTS, spliced=OTHER, unspliced=OTHER + COUNTS),
        *(None, "layers['counts']", "counts", COUNTS),
    ),
    ("other counts beside X", cells(COUNTS, counts=OTHER), None, "X", "counts", COUNTS),
    ("the choice of a layer", cells(COUNTS, counts=OTHER), Source("counts"), "layers['counts']", "counts", OTHER),
    ("the choice of X", cells(LOG, counts=COUNTS), Source("X"), "X", "lognorm", LOG),
    ("the choice of raw", cells(SCALED, LOG), Source(use_raw=True), "raw.X", "lognorm", LOG),
    ("spliced is chosen", cells(LOG, spliced=COUNTS, unspliced=OTHER), Source("spliced"), None, "counts", COUNTS),
    ("log-normalized", cells(LOG), None, "X", "lognorm", LOG),
    ("log-normalized, float16", cells(LOG.astype(np.float16)), None, "X", "lognorm", LOG),
    ("log-normalized, then genes dropped", cells(LOG[:, ::2]), None, "X", "lognorm", LOG[:, ::2]),
    ("to the median, three decimals", cells(np.log1p(CP10K / 100).round(3)[:, ::2]), None, "X", "lognorm", None),
    ("log-normalized, and so is raw", cells(LOG, LOG, 9), None, "X", "lognorm", LOG),
    ("log values said to be used", cells(LOG, counts=COUNTS), LOGNORM_SAID, "X", "lognorm", LOG),
    ("imputed log values, said", cells(IMPUTED), LOGNORM_SAID, "X", "lognorm", IMPUTED),
    ("log2(1 + CPM), said", cells(np.log2(1 + CP10K)), LOGNORM_SAID, "X", "lognorm", None),
    ("scaled", cells(SCALED), None, "X", "scaled", SCALED),
    ("Pearson residuals", cells((COUNTS - COUNTS.mean(0)) / np.sqrt(COUNTS.mean(0) + 1)), None, "X", "scaled", None),
    ("SoupX, rounded", cells(SOUP), ROUND, "X", "counts", np.rint(SOUP)),
    ("SoupX, rounded, sparse", cells(sp.csr_matrix(SOUP)), ROUND, "X", "counts", np.rint(SOUP)),
    ("decontX, rounded", cells(DECONTX), ROUND, "X", "counts", np.rint(DECONTX)),
    ("Smart-seq2 reads", cells(COUNTS * 9999 + OTHER), None, "X", "counts", COUNTS * 9999 + OTHER),
    ("two cells", cells(COUNTS[:2]), None, "X", "counts", COUNTS[:2]),
    ("three cells", cells(COUNTS[:3]), None, "X", "counts", COUNTS[:3]),
    ("an empty cell", cells(np.vstack([0 * COUNTS[:1], COUNTS])), None, "X", "counts", None),
    ("an empty gene", cells(np.hstack([0 * COUNTS[:, :1], COUNTS])), None, "X", "counts", None),
    ("numbers as gene names", named(range(G)), None, "X", "counts", COUNTS),
]


def read_by_name(rows):
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.mark.parametrize(("adata", "source", "matrix", "space", "values"), read_by_name(READ))
def test_what_is_read(adata, source, matrix, space, values):
    data = TrainingData.fit(adata, source=source, max_genes=None)
    assert data.preprocessor.space == space
    assert matrix in (None, data.preprocessor.source.name)
    assert np.isfinite(data.values()).all()
    if values is not None:
        np.testing.assert_allclose(data.dense(), values, rtol=1e-3)
    again = TrainingData.of(data.preprocessor, adata)  # a resumed run and `explain` find the same values
    np.testing.assert_array_equal(again.dense(), data.dense())


REFUSED = [  # cells, arguments, words
    ("two kinds of counts", cells(LOG, a=COUNTS, b=OTHER), {}, DIFFERENT + r".*`layer=\"a\"` or `layer=\"b\"`"),
    ("spliced and unspliced", cells(LOG, spliced=COUNTS, unspliced=OTHER), {}, r"layers\['spliced'\] and layers\['uns"),
    ("a layer and raw differ", cells(LOG, OTHER, counts=COUNTS), {}, DIFFERENT + ".*`use_raw=True`"),
    ("ones and zeros, and counts", cells(np.sign(COUNTS), counts=COUNTS), {}, "only zeros and ones"),
    ("scaled X, log raw", cells(SCALED, LOG), {}, r"X is scaled, raw.X is log.*`use_raw=True` or `layer=\"X\"`"),
    ("SoupX", cells(SOUP), {}, "counts that are not integers.*`round_counts=True`"),
    ("SoupX, sparse", cells(sp.csr_matrix(SOUP)), {}, "counts that are not integers"),
    ("RSEM expected counts", cells(RSEM), {}, "counts that are not integers"),
    ("decontX", cells(DECONTX), {}, "`round_counts=True`"),
    ("SoupX beside raw counts", cells(SOUP, counts=COUNTS), {}, r"not integers.*and `round_counts=True`"),
    ("imputed log values", cells(IMPUTED), {}, r"`space=\"lognorm\"` if they are log values"),
    ("CP10k", cells(CP10K), {}, "without a logarithm"),
    ("CP10k, then genes dropped", cells(CP10K[:, ::2]), {}, "without a logarithm"),
    ("TPM", cells(SOUP / SOUP.sum(1, keepdims=True) * 1e6), {}, "without a logarithm"),
    ("proportions", cells(COUNTS / TOTALS), {}, "without a logarithm"),
    ("log2(1 + CPM)", cells(np.log2(1 + 100 * CP10K)), {}, r"base 2.*np.log\(2\)"),
    ("log10(1 + CP10k)", cells(np.log10(1 + CP10K)), {}, "base 10"),
    ("log1p of counts", cells(np.log1p(COUNTS)), {}, "log1p of counts that are not normalized"),
    ("log2 of counts", cells(np.log2(1 + COUNTS)), {}, r"log2\(1 \+ x\) of counts"),
    ("square roots", cells(np.sqrt(COUNTS)), {}, "square root of counts"),
    ("multiples of ten", cells(10 * COUNTS), {}, "multiples of 10 only"),
    ("negative counts", cells(COUNTS - (COUNTS == 3) * 4), {}, "negative counts"),
    ("True and False", cells(COUNTS > 0), {}, "True and False"),
    ("text", cells(COUNTS.astype(int).astype(object)), {}, "not numbers"),
    ("NaN", cells(np.where(COUNTS == 2, np.nan, COUNTS)), {}, "NaN or infinite"),
    ("only zeros", cells(0 * COUNTS), {}, "only zeros"),
    ("counts above 2^24", cells(COUNTS + (COUNTS == 2) * 2.0**25), {}, "fp32 cannot hold"),
    ("counts above 2^31", cells(COUNTS.astype(np.int64) * 2**33), {}, "fp32 cannot hold"),
    ("X and nothing else missing", cells(None), {}, "no X matrix|is missing"),
    ("an unknown layer", cells(LOG, counts=COUNTS), {"layer": "count"}, "no layer 'count'; the layers are: counts"),
    ("no raw", cells(), {"use_raw": True}, "have no raw"),
    ("layer and raw", cells(), {"use_raw": True, "layer": "X"}, "either `layer` or `use_raw`"),
    ("a layer called X", cells(LOG, X=COUNTS), {}, "a layer is called"),
    ("counts said to be log", cells(), {"space": "lognorm"}, "X is raw counts, so it cannot be used as log"),
    ("log said to be counts", cells(LOG), {"space": "counts"}, "X is log-normalized, so it cannot be used as raw"),
    ("log values rounded", cells(LOG), {"round_counts": True}, "X is log-normalized, so it cannot be used as raw"),
    ("an unknown space", cells(), {"space": "log"}, "unknown `space` 'log': choose one of counts, lognorm, scaled"),
    ("one cell", cells(COUNTS[:1]), {}, "at least two cells"),
    ("genes of one name", named(["a", "a", *map(str, range(G - 2))]), {}, "duplicate gene names"),
    ("a gene without a name", named(["", *map(str, range(G - 1))]), {}, "empty name"),
    (
        "continuous label",
        with_obs(age=RNG.random(N)),
        {"label": "age"},
        "holds 60 different numbers.*`continuous='age'`",
    ),
    ("one-cell labels", with_obs(well=range(N)), {"label": "well"}, "has one cell.*so have 59 more"),
    ("missing labels", with_obs(kind=[None, *"ab" * 29, "a"]), {"label": "kind"}, "1 cells have no 'kind'"),
    ("labels that differ by spaces", with_obs(kind=["a", "a "] * 30), {"label": "kind"}, "differ only by spaces"),
    ("an empty label", with_obs(kind=["a", ""] * 30), {"label": "kind"}, "a label of 'kind' is empty"),
    ("a label *", with_obs(kind=["a", "*"] * 30), {"label": "kind"}, "stands for any label"),
    ("1 and '1'", with_obs(kind=[1, "1"] * 30), {"label": "kind"}, "read the same, '1'"),
    ("unknown genes", cells(), {"genes": ["gene-1", "CD3D"]}, "1 of 2 `genes` are not among"),
    ("a gene twice", cells(), {"genes": ["gene-1", "gene-1"]}, "names 'gene-1' twice"),
    ("no genes", cells(), {"genes": []}, "chooses no gene"),
    ("no such column of genes", cells(), {"genes": "highly_variable"}, "no column 'highly_variable' in var"),
    ("an unknown batch key", cells(), {"batch_key": "donor"}, "no column 'donor' in obs"),
    ("a batch of one cell", with_obs(donor=["x"] + ["y"] * (N - 1)), {"batch_key": "donor", "max_genes": 9}, "batch"),
    ("variable genes of two cells", cells(COUNTS[:2]), {"max_genes": 3}, "cannot be chosen from these 2 cells"),
]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize(("adata", "arguments", "words"), read_by_name(REFUSED))
def test_what_is_refused(adata, arguments, words):
    with pytest.raises(InputError, match=words) as error:
        wbdit.fit(adata, steps=1, progress=False, **arguments)
    assert "\n" not in str(error.value)


# what was found is said and saved


def test_the_choice_is_said_and_travels(log, tmp_path):
    adata = cells(LOG, COUNTS, 9)
    preprocessor = Preprocessor.fit(adata, label="type")
    found = "X is log-normalized; using the raw counts in raw.X with its 89 genes (X has 80)"
    assert log == [found]
    write_preprocessor(tmp_path, preprocessor)
    kept = read_preprocessor(tmp_path)
    assert (kept.source, kept.found) == (Source(use_raw=True), found)
    assert (kept.facts()["source"], kept.facts()["found"]) == ("raw.X", found)


def test_a_run_of_an_older_version_is_read(tmp_path):
    write_preprocessor(tmp_path, Preprocessor.fit(cells(), label="type"))
    facts = json.loads((tmp_path / "preprocessor.json").read_text())
    old = {name: facts[name] for name in ("space", "values", "genes", "scale", "labels")}
    (tmp_path / "preprocessor.json").write_text(json.dumps(old))
    kept = read_preprocessor(tmp_path)
    np.testing.assert_array_equal(kept.matrix(cells(LOG, counts=COUNTS)), COUNTS)
    assert kept.obs(np.zeros((2, 1), int))["type"].tolist() == ["B", "B"]


@pytest.mark.parametrize(
    ("trained", "later", "values"),
    [
        (cells(LOG, COUNTS), cells(OTHER), OTHER),  # only X is left
        (cells(LOG, counts=COUNTS), cells(LOG, raw_counts=OTHER), OTHER),
        (cells(COUNTS), cells(LOG, counts=OTHER), OTHER),
        (cells(COUNTS, counts=OTHER), cells(OTHER, counts=COUNTS), OTHER),  # X again
        (cells(SCALED, COUNTS), cells(COUNTS, LOG), COUNTS),  # raw holds other values
    ],
)
def test_later_cells_may_be_stored_otherwise(trained, later, values):
    np.testing.assert_array_equal(Preprocessor.fit(trained).matrix(later), values)


def test_later_cells_with_two_readings():
    preprocessor = Preprocessor.fit(cells(COUNTS))
    with pytest.raises(InputError, match=r"layers\['a'\] and layers\['b'\] are counts: put the right ones into X"):
        preprocessor.matrix(cells(LOG, a=COUNTS, b=OTHER))
    with pytest.raises(InputError, match="trained on counts, these cells hold lognorm"):
        preprocessor.matrix(cells(LOG))


def test_a_few_later_cells():
    """Two cells hold too few values to recognize a normalization, but the run knows its own."""
    preprocessor = Preprocessor.fit(cells(LOG))
    few = cells(LOG)[[3, 8]].copy()
    np.testing.assert_array_equal(preprocessor.matrix(few), LOG[[3, 8]])
    few.X = IMPUTED[:2]
    np.testing.assert_allclose(preprocessor.matrix(few), IMPUTED[:2], rtol=1e-6)
    few.X = COUNTS[:2]
    with pytest.raises(InputError, match="trained on lognorm, these cells hold counts"):
        preprocessor.matrix(few)


def test_generated_log_values_are_read_again():
    """They have lost the structure of counts, but say what they are."""
    made = cells(IMPUTED)
    made.uns["wbdit"] = {"trained_on": "lognorm"}
    assert Preprocessor.fit(made).space == "lognorm"


def test_evaluation_reads_the_real_cells_as_told():
    sets = {"real": cells(LOG, a=COUNTS, b=OTHER), "synthetic": cells(OTHER), "train": cells(LOG, a=OTHER)}
    with pytest.raises(InputError, match="real cells: X is log-normalized.*hold different counts"):
        align(sets, label="type", n_genes=50)
    aligned = align(sets, label="type", n_genes=50, source=Source("a"))
    assert aligned.space == "counts"
    np.testing.assert_array_equal(aligned.sets["real"].totals[:, 0], COUNTS.sum(1))
    np.testing.assert_array_equal(aligned.sets["train"].totals[:, 0], OTHER.sum(1))
    assert "real, train cells: layers['a'] is raw counts" in aligned.notes


def test_a_file_that_stays_on_disk(tmp_path):
    adata = backed(tmp_path)
    np.testing.assert_array_equal(TrainingData.fit(adata, label="type").dense(), COUNTS)
    adata.file.close()


def test_python_shows_messages():
    """On stderr, once, unless the user decides otherwise."""
    code = """
import logging, wbdit
logger = logging.getLogger("wbdit")
logger.info("shown")
logger.setLevel(logging.WARNING)
logger.info("silenced")
logger.setLevel(logging.INFO)
logging.basicConfig(format="in the user's format: %(message)s")
logger.info("shown once")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["shown", "in the user's format: shown once"]
    assert done.stdout == ""


# genes


def test_genes_by_name_and_by_column():
    adata = cells()
    adata.var["marker"] = np.arange(G) % 8 == 0
    by_name = TrainingData.fit(adata, genes=list(adata.var_names[adata.var["marker"]][::-1]))
    by_column = TrainingData.fit(adata, genes="marker")
    assert by_name.preprocessor.genes == by_column.preprocessor.genes == tuple(adata.var_names[::8])
    np.testing.assert_array_equal(by_column.dense(), COUNTS[:, ::8])
    adata.var["mean"] = 0.5
    with pytest.raises(InputError, match="column 'mean' of var holds float64"):
        TrainingData.fit(adata, genes="mean")
    adata.var["symbol"] = [f"S{i}" for i in range(G)]
    with pytest.raises(InputError, match=r"they are in var\['symbol'\]"):
        TrainingData.fit(adata, genes=["S3"])


def test_a_column_of_x_chooses_genes_of_raw():
    adata = cells(LOG, COUNTS, 9)
    adata.var["highly_variable"] = np.arange(G) < 7
    data = TrainingData.fit(adata, genes="highly_variable")
    np.testing.assert_array_equal(data.dense(), COUNTS[:, :7])


def test_variable_genes_within_batches(monkeypatch):
    """Genes that only differ between batches are not variable within them; no optional package is needed."""
    monkeypatch.setitem(sys.modules, "scanpy", None)
    rng = np.random.default_rng(2)
    rate = np.tile(rng.gamma(2.0, 3.0, 200), (N, 1))
    rate[: N // 2, :5] *= 5
    adata = ad.AnnData(rng.poisson(rate).astype(np.float32))
    adata.obs["donor"] = ["a"] * (N // 2) + ["b"] * (N // 2)
    differ = set(adata.var_names[:5])
    assert len(differ & set(Preprocessor.fit(adata, max_genes=10).genes)) >= 4
    within = Preprocessor.fit(adata, max_genes=10, batch_key="donor").genes
    assert len(within) == 10
    assert len(differ & set(within)) <= 2  # by chance


@pytest.mark.parametrize("batches", [None, np.arange(90) % 2])
@pytest.mark.parametrize(("space", "flavor"), [("counts", "seurat_v3"), ("lognorm", "seurat")])
def test_variable_genes_are_those_of_scanpy(space, flavor, batches):
    sc = pytest.importorskip("scanpy")
    rng = np.random.default_rng(1)
    mean = rng.gamma(1.0, 20.0, 400) + 3
    counts = rng.poisson(rng.gamma(rng.gamma(2, 2, 400), mean, (90, 400)) / 2).astype(np.float64)
    adata = ad.AnnData(counts if space == "counts" else np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))
    if batches is not None:
        adata.obs["batch"] = pd.Categorical(batches.astype(str))
    key = None if batches is None else "batch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = sc.pp.highly_variable_genes(adata, flavor=flavor, n_top_genes=50, batch_key=key, inplace=False)
    chosen = variable_genes(MemoryMatrix(adata.X), space, 50, batches)
    np.testing.assert_array_equal(chosen, theirs["highly_variable"].to_numpy())


# annotation


def test_annotation_travels(tmp_path):
    adata = cells()
    adata.var["symbol"] = [None, *(f"S{i}" for i in range(1, G))]
    adata.var["biotype"] = pd.Categorical(["coding", "lncRNA"] * (G // 2))
    adata.var["mito"] = np.arange(G) < 3
    adata.var["mean"], adata.var["n_cells"], adata.var["highly_variable"] = 0.5, 7, True
    adata.obs["dose"] = np.tile([10, 2, 1], N // 3)
    adata.obs["stage"] = pd.Categorical(["late", "early"] * (N // 2), ["early", "never", "late"], ordered=True)
    adata.uns["stage_colors"] = ["#000", "#111", "#222"]
    preprocessor = Preprocessor.fit(adata, label=["stage", "dose"])
    write_preprocessor(tmp_path, preprocessor)
    for kept in (preprocessor, read_preprocessor(tmp_path)):
        var = kept.decode(COUNTS, TOTALS[:, 0]).var
        assert list(var) == ["symbol", "biotype", "mito"]
        assert (var["symbol"].iloc[0], var["symbol"].iloc[1]) == (None, "S1")
        assert var["biotype"].cat.categories.tolist() == ["coding", "lncRNA"]
        assert var["mito"].dtype == bool
        obs = kept.obs(kept.labels.codes(adata))
        assert obs["stage"].tolist() == adata.obs["stage"].tolist()
        assert obs["stage"].cat.ordered
        assert obs["stage"].cat.categories.tolist() == ["early", "late"]  # unused categories are dropped
        assert obs["dose"].cat.categories.tolist() == ["1", "2", "10"]
        assert kept.annotations.uns()["stage_colors"].tolist() == ["#000", "#222"]


# labels


def test_columns_that_are_categories():
    adata = with_obs(cluster=np.arange(N) % 12, treated=np.arange(N) % 2 == 0, dose=np.tile([0.0, 0.1, 1.0], N // 3))
    labels = Preprocessor.fit(adata, label=["cluster", "treated", "dose"]).labels
    assert labels.label_sizes == (12, 2, 3)
    codes = labels.codes_from_counts({"10/True/0.1": 1, " 2 / False/1.0": 1})
    assert [labels.name(row) for row in codes] == ["10/True/0.1", "2/False/1.0"]


def test_two_columns_of_one_name():
    adata = cells()
    adata.obs = pd.concat([adata.obs, adata.obs], axis=1)
    with pytest.raises(InputError, match="obs has 2 columns 'type': rename or drop"):
        Preprocessor.fit(adata, label="type")


# the commands


@pytest.fixture
def h5ad(tmp_path):
    def write(adata):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return write


def test_the_shell_chooses_a_matrix(h5ad, tmp_path, capfd):
    path = h5ad(cells(LOG, spliced=COUNTS, unspliced=OTHER))
    train = ("train", path, "--label", "type", "--steps", 1, "--out", tmp_path / "run")
    assert exit_code(*train) == 2
    assert "choose with --layer spliced or --layer unspliced or --layer X" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert exit_code(*train, "--layer", "spliced") == 0
    assert capfd.readouterr().err.count("layers['spliced'] is raw counts") == 1
    assert json.loads((tmp_path / "run" / "preprocessor.json").read_text())["source"]["layer"] == "spliced"
    assert exit_code("generate", tmp_path / "run", "--n", 4, "--calls", 1, "--out", tmp_path / "new.h5ad") == 0
    made = ad.read_h5ad(tmp_path / "new.h5ad").uns["wbdit"]
    assert (made["source"], made["trained_on"]) == ("layers['spliced']", "counts")


@pytest.mark.parametrize(
    ("adata", "flags", "words"),
    [
        (cells(SOUP), (), "round these with --round\n"),
        (cells(IMPUTED), (), "say --space lognorm if they are log values, or --round if they are counts"),
        (cells(SCALED, LOG), (), "choose with --use-raw or --layer X"),
        (cells(), ("--genes", "none.txt"), "cannot read the gene list none.txt"),
        (cells(), ("--genes", "marker"), "no column 'marker' in var"),
        (cells(), ("--batch-key", "donor"), "no column 'donor' in obs"),
    ],
)
def test_the_shell_names_its_flags(h5ad, tmp_path, capfd, adata, flags, words):
    assert exit_code("train", h5ad(adata), "--steps", 1, "--out", tmp_path / "run", *flags) == 2
    line = capfd.readouterr().err
    assert words in line
    assert line.count("\n") == 1
    assert "`" not in line


def test_labels_with_commas_and_equals_signs():
    assert _parse_per_label("CD4, naive=200,a=b=3, B =1") == {"CD4, naive": 200, "a=b": 3, "B": 1}
