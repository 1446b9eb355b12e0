/** Plain data: what JSON carries. Records that outlive a process are made of nothing else. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };
