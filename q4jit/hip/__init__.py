"""The back end for GPUs; `backend` names its stages for the pipeline.

`schedule` chooses a template for each kernel and `sizing` its constants, from what the weights
allow (`problem`), measured `rules` for each platform, and what an arch can run (`limits`,
`memory`); `choices` puts measured constants (`tunings`) in their place. `render` writes the text:
`templates` finds the templates, `variables` fills them with `values` of the graph and facts of each
`weight`. `launch` runs the kernels. `search` times `candidates` on a `harness` and keeps the best.
"""
