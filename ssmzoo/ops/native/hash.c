// What this library was compiled from (sources.py); compared with the sources beside it when it is loaded.
const char *ssmzoo_source_hash(void) { return SSMZOO_SOURCE_HASH; }
