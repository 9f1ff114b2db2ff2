"""What the documentation shows is run as it stands there: the notebook, and the README's Python."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_goes_from_data_to_a_report(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:  # the same cells, with less training
        cell.source = re.sub("repeats=2|epochs=4", lambda match: match[0][:-1] + "1", cell.source).replace("range(60)", "range(32)")
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    texts = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("rare F1" in text for text in texts) == 2
    assert (tmp_path / "study" / "report" / "report.html").is_file()
    assert (tmp_path / "study-of-my-own" / "report" / "report.html").is_file()


def test_the_readmes_ten_lines_of_python_print_a_verdict(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    rng, rows = np.random.default_rng(0), []
    for number in range(40):
        label = "rare" if number % 3 == 0 else "common"
        image = rng.integers(0, 80, (32, 32), dtype=np.uint8)
        image[:, :16] += np.uint8(100 if label == "rare" else 0)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": label, "patient": f"p{number}"})
    pd.DataFrame(rows).to_csv(tmp_path / "labels.csv", index=False)
    # The same lines on small images and networks that need no hub.
    quick = {
        "resnet50": "cifar_resnet14",
        "mobilenet_v2": "small_cnn",
        "pretrained=True": "size=32",
        "epochs=30": "epochs=1",
        "folds=5, repeats=3": "folds=2, repeats=1",
    }
    for given, small in quick.items():
        assert given in code
        code = code.replace(given, small)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rare F1" in done.stdout
    assert "report.html" in done.stdout
