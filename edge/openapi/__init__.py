"""The description of the REST API as OpenAPI 3.1 and as a page to read, made from the contracts and their comments when
gen/ is made; a running edge only hands both out."""
