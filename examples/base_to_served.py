"""From two checkpoints to an answer: extract an adapter, register it, serve it, ask it.

    python examples/base_to_served.py BASE TUNED "a prompt"

BASE and TUNED are checkpoint folders or Hub ids of one architecture; the adapter goes into the registry of FLORA_HOME.
Needs: pip install -e '.[serve]' openai
"""

import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

from flora.checkpoint import locate_checkpoint, open_checkpoint
from flora.extract import ExtractConfig, extract
from flora.rank import RankRule
from flora.registry import Registry

PORT = 8321
NAME = "example"


def main(base_source: str, tuned_source: str, prompt: str) -> None:
    base, tuned = (open_checkpoint(locate_checkpoint(source)) for source in (base_source, tuned_source))
    result = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=64)))
    report = result.adapter.report
    assert report is not None
    print(f"kept {report.extracted_share:.1%} of the linear layers' change, {report.kept_share:.1%} of the whole")

    with Registry.open() as registry:
        registry.register_base(result.base_record, name=base.name, path=base.path)
        version = registry.add(result.adapter, NAME)
        size, whole = version.num_bytes / 1e6, tuned.num_bytes / 1e6
        print(f"registered as {version.ref}: {size:.1f} MB, where the checkpoint has {whole:.1f} MB")

    server = subprocess.Popen([sys.executable, "-m", "flora", "serve", str(base.path), "--port", str(PORT)])
    try:
        wait_for(f"http://127.0.0.1:{PORT}/health", server)
        client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
        models = [model.id for model in client.models.list()]
        print(f"served: {', '.join(models)}")
        for model in (models[0], NAME):
            done = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
            print(f"{model}: {done.choices[0].text!r}")
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Returns when the server answers; a base of some gigabytes takes a while to read."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit(f"flora serve ended with code {server.returncode}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
