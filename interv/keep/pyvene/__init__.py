"""pyvene's saved folders, both ways: `config.json` and a pickle of tensors for each intervention.

As pyvene 0.1.8 writes and reads them (`IntervenableModel.save` and `.load` in
`pyvene/models/intervenable_base.py`). Its pickles are read with `weights_only`, so that nothing
of theirs is run; pyvene itself is not needed.

What pyvene does not save, because its caller names it at each call: positions, heads, subspaces.
`write_pyvene` records them under `interv` in `config.json`, where pyvene leaves them alone; of
other folders `read_pyvene` is told them. Where pyvene can only swap the first k coordinates
without being told at the call, ours are put first: the function is the same, not the tensors.
"""

from interv.keep.pyvene.read import read_pyvene
from interv.keep.pyvene.words import orthogonal, parametrized
from interv.keep.pyvene.write import write_pyvene

__all__ = ["orthogonal", "parametrized", "read_pyvene", "write_pyvene"]
