#!/bin/sh
# torch 2.13.0. `module.to(dtype)`, said to change a module in place, keeps every Parameter object and gives it new data, but puts a new
# tensor in the place of every buffer. So a Parameter that was remembered, or shared by two modules, stays what the module uses; a
# remembered buffer goes stale, and a buffer that layers share (a table of positions, a mask) becomes a copy for each of them: as many
# times the memory, and a later write to one is not seen by the others. Moving to another device goes the same way (to "meta" replaces
# Parameters, too).
. "$(dirname "$0")/run_with"
run_with torch==2.13.0 numpy==2.4.6 <<'PYTHON'
import torch

LAYERS = 3


class Layer(torch.nn.Module):
    def __init__(self, weight, table):
        super().__init__()
        self.weight = weight
        self.register_buffer("table", table)


print("torch", torch.__version__)
weight, table = torch.nn.Parameter(torch.ones(4)), torch.ones(4)
model = torch.nn.Sequential(*(Layer(weight, table) for _ in range(LAYERS)))


def different(name):
    """How many pieces of memory the layers' tensors of a name are."""
    return len({getattr(layer, name).data_ptr() for layer in model})


assert (different("weight"), different("table")) == (1, 1)
assert model.to(torch.float32)[0].table is table
print("to(float32), which changes nothing: the buffer is the same tensor")
model.to(torch.float64)
kept = model[0].weight is weight, model[0].table is table
print(f"to(float64): the Parameter is the same object: {kept[0]} ({weight.dtype}); the buffer: {kept[1]} ({table.dtype})")
print(f"tensors of {LAYERS} layers that shared one: Parameter {different('weight')}, buffer {different('table')}")
with torch.no_grad():
    model[0].weight.fill_(2)
    model[0].table.fill_(2)
seen = model[1].weight[0].item(), model[1].table[0].item()
print(f"after writing 2 to the first layer's, the second layer's Parameter is {seen[0]}, its buffer {seen[1]}")
if kept != (True, False) or (different("weight"), different("table")) != (1, LAYERS) or seen != (2, 1):
    raise SystemExit("changed: Parameters and buffers are moved alike")
PYTHON
