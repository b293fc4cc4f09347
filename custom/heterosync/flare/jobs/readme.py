"""The README of a job folder, for the hospital's reviewer: what is trained, what leaves the site, how to run it."""

from __future__ import annotations

from heterosync.data.site_yaml import VOLUMES
from heterosync.federation.privacy import epsilon_of
from heterosync.flare.jobs.options import JobOptions
from heterosync.methods.base import Method
from heterosync.methods.traffic import amount as in_words
from heterosync.methods.traffic import bytes_per_image, state_bytes, traffic


def readme(method: Method, options: JobOptions, byoc: bool = False) -> str:
    """Text of README.md, made from the method's own words; the same inputs always give the same text."""
    model = method.build_model(weights="none")
    names = method.shared_names(model)
    back = method.returned_names(model)
    size = state_bytes(model, names)
    training = method.training
    least = (
        f"{options.min_clients} sites" if options.min_clients and not method.needs_all else "all sites that take part"
    )
    amount = f"{len(names)} tensors, {in_words(size)} per site and round "
    amount += (
        "in each direction" if names == back else f"to the site, {len(back)} tensors, {traffic(method, model)} back"
    )
    amount = amount if names else "no tensor leaves or enters a site"
    models = ", `last_model.pt`, `best_model.pt`" if names else ""
    leaves = "\n".join(f"- {line}" for line in method.leaves)
    overrides = {**options.method_settings, **options.training_dict()}
    settings = "".join(f"- `{name}`: {value}\n" for name, value in overrides.items()) or "All settings have defaults.\n"
    code, package = "Configuration only: no Python travels with this job.", "the installed package `heterosync`"
    if byoc:
        code = "This job brings Python code along: the package `heterosync`, in `app/custom`. Sites must allow that."
        code += "\nWhere heterosync is installed too, FLARE takes the installed one: run.json names the version."
        package = "that package"
    own = (
        "\nA site's own best model is `trainings/<job id>/own_best.pt` beside it; `heterosync predict` reads it."
        if method.personal
        else ""
    )
    name, command, to_whom = method.name, f"heterosync job export {method.name}", "The weights go to the server.\n"
    parts = "an executor, an outbound filter, a controller, an\naggregator and a persistor"
    fused = f"Fusion weights: {method.weighting}"
    classes = "W0 are scalars, W1 weights, W2 summary statistics of private data"
    if any(line.startswith("W4") for line in method.leaves):
        classes += ", W4 synthetic\nimages or their generator"
    if method.split:
        fused = "No weights are fused: the server trains its half on the\nbatches of all sites, which are of one size"
        classes += ", W3 activations and labels of single\nimages"
        step = training.batch_size * bytes_per_image(method, model) / 2**20
        amount = f"{traffic(method, model)} to the server, as much back as gradients ({step:.1f} MiB each way in\n"
        amount += f"a step of {training.batch_size} images), and {in_words(size)} of weights to the site per round"
        to_whom = _SPLIT
        own = f"{own}\n`last_model.pt` and `best_model.pt` hold the server's half alone."
    if (options.topology or method.topology) == "swarm":
        to_whom, models = _SWARM, ""
        if method.topology != "swarm":
            name, command = f"{name}_swarm", f"{command} --topology swarm"
        parts = "an executor, an outbound gate to the server\nand one to the sites, a controller, "
        parts += "an aggregator and a persistor"
        own = "\nThe models stay at the sites: `last_model.pt`, `best_model.pt` in each site's folder of the job."
    if options.dp_clip is not None:
        name, command = f"{name}_dp", f"{command} --dp-clip {options.dp_clip:g} --dp-noise {options.dp_noise:g}"
        to_whom += _privacy(options.dp_clip, options.dp_noise, training.rounds)
    epochs = "epoch" if training.local_epochs == 1 else "epochs"
    place, clients, pooled = "/path/to/alliance", "site-a,site-b -t 2", ""
    if method.task.name == VOLUMES:  # as `heterosync data phantoms` names its sites
        clients = "north,south,west -t 3"
    if method.pooled:
        place, clients, pooled = "/path/to", "alliance -t 1", _POOLED
    return f"""# {method.title}

Written by `{command}`; a change by hand is lost at the next export.
{code} It names {parts} of {package}.

## What is trained

{method.citation}. Status: {method.status}.

{training.rounds} rounds of {training.local_epochs} local {epochs}, {method.in_words()}.
A round needs {least}. {fused}.

{settings}
## What leaves a site

{leaves}

{classes}. Traffic: {amount}.
{to_whom if names else ""}Images, predictions, file names and patient identifiers never leave. The outbound filter
of this job holds the allow-list, blocks everything else, and writes a line per message (name, shape, type, bytes) into
`audit.jsonl` in the site's folder of the job.

## Where a site's data is found

Never from this job, but, first that is set: `data_root` in the site's own `local/privacy.json`; the environment
variable `HETEROSYNC_DATA`, as the folder that holds `<site name>/`, or as the site folder itself.
{pooled}
## How to run it

`jobs/{name}` stands for the path of this folder. Simulator, from the root of the repository:

```
HETEROSYNC_DATA={place} nvflare simulator jobs/{name} -w poc/simulator -c {clients}
```

`-c` names the sites' folders there, `-t` says how many train at once.
`poc/simulator/local/resources.json` lists the classes that a job may name; in another workspace FLARE refuses them
("not in allow_list") unless the same file lies there. `heterosync simulate jobs/{name}` prepares any workspace
and shows the progress.

POC and production, from the admin console: `submit_job jobs/{name}`, or

```
nvflare job submit -j jobs/{name}
```

Results appear in the server's folder of the job after every round: `history.csv`, `cross_site_metrics.json`,
`run.json`, `tensorboard/`{models}. Predictions stay at the sites, in `heterosync/results/` of
the site's folder of the job.{own}
"""


_POOLED = """
This is no federation: the job has one client, which must hold the images of all sites. It takes the name of the folder
with the sites' folders; their training, validation and test splits are united.
"""

#: What the server sees of a network that is cut.
_SPLIT = """
**The highest privacy class is W3**: activations of single images go to the server in every step, with their labels or
with numbers that tell these. It trains its half of the network on them and sends that half to the sites before every
round. Ask whether your site may take part: `methods` in its `local/privacy.json` can leave this method out. The sites
train in step: in the simulator, give `-t` as many threads as sites.

"""

#: Who gets the weights when the sites fuse among themselves.
_SWARM = """The weights go from site to site and not to the server: every round one site, drawn by chance, gets the
weights of all others with their scalars of the round, fuses them and sends the result to all. The server gets the
scalars and the check-in. With FLARE's secure kits messages between sites are encrypted from site to site, though they
pass through the server; the simulator has no encryption. There, give `-t` as many threads as sites.
"""


def _privacy(clip: float, noise: float, rounds: int) -> str:
    """What the noise of a job gives, in figures (docs/privacy.md)."""
    text = f"Each update (the change of the weights in a round) is shortened to an L2 norm of {clip:g}"
    if not noise:
        return f"{text}, without noise:\nthat is no formal guarantee.\n"
    epsilon = epsilon_of(1e-5, noise, rounds)
    return f"""{text}; every element
gets Gaussian noise of standard deviation {noise * clip:g}. The weights of all {rounds} rounds together are
({epsilon:.3g}, 1e-5)-differentially private; the unit is all data of the site. The scalars get no noise.
"""
