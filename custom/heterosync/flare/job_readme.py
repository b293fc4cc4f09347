"""The README of a job folder, for the hospital's reviewer: what is trained, what leaves the site, how to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heterosync.methods.base import Method, bytes_per_round

if TYPE_CHECKING:
    from heterosync.flare.job import JobOptions


def readme(method: Method, options: JobOptions, byoc: bool = False) -> str:
    """Text of README.md, made from the method's own words; the same inputs always give the same text."""
    model = method.build_model(weights="none")
    names, size = method.shared_names(model), bytes_per_round(method, model)
    training = method.training
    least = f"{options.min_clients} sites" if options.min_clients else "all sites that take part"
    traffic = (
        f"{len(names)} tensors, {size / 2**20:.1f} MiB per site and round in each direction"
        if names
        else "no tensor leaves or enters a site"
    )
    models = ", `last_model.pt`, `best_model.pt`" if names else ""
    leaves = "\n".join(f"- {line}" for line in method.leaves)
    overrides = {**options.method_settings, **options.training_dict()}
    settings = "".join(f"- `{name}`: {value}\n" for name, value in overrides.items()) or "All settings have defaults.\n"
    code, package = "Configuration only: no Python travels with this job.", "the installed package `heterosync`"
    if byoc:
        code = "This job brings Python code along: the package `heterosync`, in `app/custom`. Sites must allow that."
        package = "that package"
    own = (
        ""
        if names
        else "\nThere, `heterosync/own_best.pt` is the site's own best model; `heterosync predict` reads it."
    )
    return f"""# {method.title}

Written by `heterosync job export {method.name}`; a change by hand is lost at the next export.
{code} It names an executor, an outbound filter, a controller, an
aggregator and a persistor of {package}.

## What is trained

{method.citation}. Status: {method.status}.

{training.rounds} rounds of {training.local_epochs} local epochs, {training.backbone} at {training.image_size} px.
A round needs {least}. Fusion weights: {method.weighting}.

{settings}
## What leaves a site

{leaves}

W0 are scalars, W1 weights, W2 summary statistics of private data. Traffic: {traffic}.
Images, predictions, file names and patient identifiers never leave. The outbound filter of this job holds the
allow-list, blocks everything else, and writes a line per message (name, shape, type, bytes) into `audit.jsonl` in the
site's folder of the job.

## Where a site's data is found

Never from this job, but, first that is set: `data_root` in the site's own `local/privacy.json`; the environment
variable `HETEROSYNC_DATA`, as the folder that holds `<site name>/`, or as the site folder itself.

## How to run it

`jobs/{method.name}` stands for the path of this folder. Simulator, from the root of the repository:

```
HETEROSYNC_DATA=/path/to/alliance nvflare simulator jobs/{method.name} -w poc/simulator -c site-a,site-b -t 2
```

`poc/simulator/local/resources.json` lists the classes that a job may name; in another workspace FLARE refuses them
("not in allow_list") unless the same file lies there. `heterosync simulate jobs/{method.name}` prepares any workspace
and shows the progress.

POC and production, from the admin console: `submit_job jobs/{method.name}`, or

```
nvflare job submit -j jobs/{method.name}
```

Results appear in the server's folder of the job after every round: `history.csv`, `cross_site_metrics.json`,
`run.json`, `tensorboard/`{models}. Predictions stay at the sites, in `heterosync/results/` of
the site's folder of the job.{own}
"""
