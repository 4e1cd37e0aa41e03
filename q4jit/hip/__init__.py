"""The back end for GPUs; `backend` lists its stages for the pipeline.

Plan: `schedule` chooses a template for each kernel, and `sizing` chooses its constants. Both use
facts about the weights (`problem`), the `rules` of each platform, and the limits of an arch
(`limits`, `memory`). `choices` replaces these constants by measured ones (`tunings`).

Render: `templates` finds the templates. `variables` fills them with `values` of the graph and facts
about each `weight`.

Launch: `launch` runs the kernels. `search` times `candidates` on a `harness` and keeps the results.
"""
