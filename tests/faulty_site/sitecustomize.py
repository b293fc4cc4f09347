"""A site whose code is not ours: it spoils its training answers after its own filters have let them pass.

Python runs this file at its start when the folder is on PYTHONPATH. TOY_FAULTS is JSON: round -> name of the fault.
"""

import json
import os
import sys


def spoil(fault, tensors, fields):
    """Change one training answer in place."""
    import torch

    name = sorted(name for name, value in tensors.items() if value.is_floating_point() and value.dim() > 0)[0]
    if fault == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    elif fault == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    elif fault == "missing":
        del tensors[name]
    elif fault == "junk":
        tensors["junk"] = torch.zeros(64 * 2**18)  # 64 MiB
    elif fault == "flood":
        tensors["junk"] = torch.zeros(2 * 2**28)  # 2 GiB
    elif fault == "old round":
        fields["round"] -= 1
    elif fault == "text":
        fields["metrics"] = {**fields["metrics"], "patient": 4711.0}
    else:
        raise ValueError(fault)


def break_in(faults):
    from heterosync.flare import messages
    from heterosync.flare.filters import OutboundFilter

    honest = OutboundFilter.process

    def process(self, shareable, fl_ctx):
        reply = honest(self, shareable, fl_ctx)
        fault = faults.get(str(fl_ctx.get_prop(messages.ROUND)))
        if type(self) is not OutboundFilter or fault is None or messages.failure_of(reply) is not None:
            return reply
        tensors, fields = messages.open_message(reply)
        if not tensors:
            return reply
        spoil(fault, tensors, fields)
        spoilt = messages.tensors_message(tensors, fields)
        spoilt.set_return_code(reply.get_return_code())
        return spoilt

    OutboundFilter.process = process


if "TOY_FAULTS" in os.environ and any("worker_process" in word for word in sys.orig_argv):
    break_in(json.loads(os.environ["TOY_FAULTS"]))
