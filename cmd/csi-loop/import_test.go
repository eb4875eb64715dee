package main

import "testing"

// No two claims give one name.
func TestImportNames(t *testing.T) {
	names := map[string]string{}
	for _, claim := range []string{"team/a-data", "team-a/data", "team/a.data"} {
		f := importFlags{claim: claim, reclaim: "Retain"}
		namespace, name, err := f.check()
		if err != nil || namespace+"/"+name != claim {
			t.Errorf("%s: %s/%s, %v", claim, namespace, name, err)
		}
		if other, ok := names[f.name]; ok {
			t.Errorf("%s and %s are both %s", claim, other, f.name)
		}
		names[f.name] = claim
	}
}
