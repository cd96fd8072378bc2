"""The job: YAML and overrides in; one frozen `JobSpec`, and the dict DeepSpeed gets, out.

`loading` reads and validates (`document` keeps the lines, `explain` words the errors), `resolved`
writes a job back, `deepspeed_file` checks the DeepSpeed JSON, `deepspeed` merges it with the job's
numbers, `shipped` finds the jobs and JSON files that come with the package, `schema` describes the
job to editors.
"""
