"""Everything between a site's training and the global model: fusion, the wire, records, and a runner without FLARE."""
