import subprocess

from vaeflow.common import processes

MODULE = """
import gc, sys
print(gc.get_threshold(), sys.argv[1:])
sys.exit(3)
"""


def test_a_module_is_run_as_python_would_with_the_collector_out_of_the_way(tmp_path):
    (tmp_path / "asked.py").write_text(MODULE)
    command = processes.python_command("asked", "one", "--two")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == f"{processes.COLLECTION_THRESHOLDS} ['one', '--two']"
    assert done.returncode == 3
