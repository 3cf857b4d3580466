tick()
register(worker, registration)
return { 0, {} }
