"""`optgrad doctor` says what is there, and fails where the self test does."""

from typer.testing import CliRunner

from optgrad.experiments import cli, data, doctor


def test_what_is_there_is_found(tmp_path, monkeypatch):
    """Versions, devices, extras, every data set, the cache; nothing is downloaded."""
    monkeypatch.setattr(data, "user_cache", lambda: tmp_path / "cache")
    monkeypatch.delenv("OPTGRAD_DATA_DIR", raising=False)
    run = CliRunner().invoke(cli.app, ["doctor", "--data-dir", str(tmp_path)])
    assert run.exit_code == 0, run.output
    for word in ("jaxlib", "devices", "extra experiments", "self test", "0 files"):
        assert word in run.output
    findings = {f.name: f for f in doctor.findings(tmp_path)}
    assert all(f"data {name}" in findings for name in data.datasets())
    assert not findings["data mnist"].is_fine
    assert findings["data digits"].is_fine
    assert list(tmp_path.iterdir()) == []


def test_data_is_found_where_load_finds_it(real_data_dir):
    """The real MNIST, by its folder."""
    assert data.whereabouts("mnist", real_data_dir) == real_data_dir / "mnist"


def test_missing_extras_are_named(monkeypatch):
    """By what the package's metadata asks for."""
    wanted = ["numpy>=1", "no-such-package>=2; extra == 'bench'", "rich; extra == 'bench'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    assert doctor._extras() == {"bench": ["no-such-package"]}


def test_a_wrong_number_fails(monkeypatch):
    """The self test compares with a formula of its own."""
    monkeypatch.setattr(doctor, "_by_formula", lambda gradients: 1.0 + gradients)
    assert not doctor.self_test().is_fine
    run = CliRunner().invoke(cli.app, ["doctor"])
    assert run.exit_code == 1
