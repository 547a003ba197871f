"""Visible-infrared person re-identification on top of the MRCN block.

`data` has data sets and batches, `models` the network, `training` the loop and its files, `evaluation` test
features and scores, `paper` the tables and figures, `report` the page about trained networks, and `search`
the search in one's own images. export.py writes the test path for ONNX and torch.export. demo.py is
`mrcn-fast demo`. The other modules serve all of them: settings.py checks values against annotations, of
which kinds.py has the common ones and messages.py the messages; devices.py opens the device, documents.py
reads YAML and JSON within limits, stored.py reads files of torch and safetensors, arrays.py converts the
arrays of callers, and console.py has log lines and progress bars. moved.py lets modules be imported by the
names they had before.
"""

from mrcn_fast.reid.moved import serve_former_names

serve_former_names()
