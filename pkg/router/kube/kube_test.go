package kube

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

func TestMain(m *testing.M) { roottest.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func jwt(claims string) string {
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".sig"
}

func TestReviewer(t *testing.T) {
	good := func() authentication.TokenReviewStatus {
		return authentication.TokenReviewStatus{
			Authenticated: true, Audiences: []string{link.Audience},
			User: authentication.UserInfo{
				Username: "system:serviceaccount:ns:node",
				Extra: map[string]authentication.ExtraValue{
					extraPod: {"p"}, extraPodUID: {"pu"}, extraNode: {"n"}, extraUID: {"nu"},
				},
			},
		}
	}
	type status = authentication.TokenReviewStatus
	for name, tt := range map[string]struct {
		token  string
		change func(*status)
		ok     bool
	}{
		"a node's pod":          {jwt(`{"exp":1900000000}`), func(*status) {}, true},
		"not authenticated":     {jwt(`{"exp":1900000000}`), func(s *status) { s.Authenticated = false }, false},
		"other audience":        {jwt(`{"exp":1900000000}`), func(s *status) { s.Audiences = []string{"api"} }, false},
		"no audience":           {jwt(`{"exp":1900000000}`), func(s *status) { s.Audiences = nil }, false},
		"other service account": {jwt(`{"exp":1900000000}`), func(s *status) { s.User.Username = "system:serviceaccount:ns:other" }, false},
		"other namespace":       {jwt(`{"exp":1900000000}`), func(s *status) { s.User.Username = "system:serviceaccount:x:node" }, false},
		"no pod":                {jwt(`{"exp":1900000000}`), func(s *status) { delete(s.User.Extra, extraPod) }, false},
		"no pod UID":            {jwt(`{"exp":1900000000}`), func(s *status) { delete(s.User.Extra, extraPodUID) }, false},
		"no node":               {jwt(`{"exp":1900000000}`), func(s *status) { delete(s.User.Extra, extraNode) }, false},
		"no node UID":           {jwt(`{"exp":1900000000}`), func(s *status) { s.User.Extra[extraUID] = nil }, false},
		"two nodes":             {jwt(`{"exp":1900000000}`), func(s *status) { s.User.Extra[extraNode] = authentication.ExtraValue{"a", "b"} }, false},
		"does not expire":       {jwt(`{}`), func(*status) {}, false},
		"not a JWT":             {"secret", func(*status) {}, false},
		"claims are no base64":  {"a.!.c", func(*status) {}, false},
		"claims are no JSON":    {jwt("x"), func(*status) {}, false},
	} {
		t.Run(name, func(t *testing.T) {
			client := fake.NewClientset()
			client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
				review := a.(clienttesting.CreateAction).GetObject().(*authentication.TokenReview)
				if review.Spec.Token != tt.token || !slices.Equal(review.Spec.Audiences, []string{link.Audience}) {
					t.Errorf("asked for %+v", review.Spec)
				}
				review.Status = good()
				tt.change(&review.Status)
				return true, review, nil
			})
			id, err := (&Reviewer{Client: kubeapitest.Of(client), Namespace: "ns", ServiceAccount: "node"}).Authenticate(t.Context(), tt.token)
			if !tt.ok {
				if !errors.Is(err, router.ErrToken) {
					t.Errorf("%+v, %v", id, err)
				}
				return
			}
			want := router.Identity{Node: "n", NodeUID: "nu", Pod: "p", PodUID: "pu", Expires: time.Unix(1900000000, 0)}
			if err != nil || id != want {
				t.Errorf("%+v, %v", id, err)
			}
		})
	}
	client := fake.NewClientset()
	client.PrependReactor("create", "tokenreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("the API server is away")
	})
	if _, err := (&Reviewer{Client: kubeapitest.Of(client)}).Authenticate(t.Context(), "x"); err == nil || errors.Is(err, router.ErrToken) {
		t.Errorf("an outage is no bad token: %v", err)
	}
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("not in 20 s")
		}
	}
}

func TestRoster(t *testing.T) {
	with := &storage.CSINode{ObjectMeta: meta.ObjectMeta{Name: "a"}, Spec: storage.CSINodeSpec{Drivers: []storage.CSINodeDriver{{Name: "other"}, {Name: "d"}}}}
	without := &storage.CSINode{ObjectMeta: meta.ObjectMeta{Name: "b"}}
	client := fake.NewClientset(with, without)
	r := NewRoster(kubeapitest.Of(client), "d")
	if _, ok := r.Registered(); ok || !r.Exists("z") {
		t.Error("it knows before it has looked")
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { r.Run(ctx) })
	// What is deleted before the watch has begun the fake server does not tell.
	watches := func(a clienttesting.Action) bool { return a.GetVerb() == "watch" }
	eventually(t, func() bool {
		_, ok := r.Registered()
		return ok && slices.ContainsFunc(client.Actions(), watches)
	})
	if names, _ := r.Registered(); !slices.Equal(names, []string{"a"}) || !r.Exists("b") || r.Exists("z") {
		t.Error(names)
	}
	must(t, client.StorageV1().CSINodes().Delete(ctx, "a", meta.DeleteOptions{}))
	eventually(t, func() bool { return !r.Exists("a") })
	cancel()
	wg.Wait()
}

func TestReplicas(t *testing.T) {
	client := fake.NewClientset()
	now := time.Now()
	var told []string
	replica := func(address string) *Replicas {
		return &Replicas{
			Client: kubeapitest.Of(client), Namespace: "ns", Driver: "d", Self: address, Now: func() time.Time { return now },
			Tell: func(a []string) { told = a },
		}
	}
	a, b := replica("10.0.0.1:9808"), replica("10.0.0.2:9808")
	must(t, a.round(t.Context()))
	if !slices.Equal(told, []string{a.Self}) {
		t.Error(told)
	}
	must(t, b.round(t.Context()))
	must(t, a.round(t.Context()))
	if !slices.Equal(told, []string{a.Self, b.Self}) {
		t.Error(told)
	}
	now = now.Add(replicaLease)
	must(t, a.round(t.Context()))
	if !slices.Equal(told, []string{a.Self}) {
		t.Errorf("a replica that is gone counts: %v", told)
	}
	now = now.Add(replicaGone)
	must(t, a.round(t.Context()))
	left, err := client.CoordinationV1().Leases("ns").List(t.Context(), meta.ListOptions{})
	if err != nil || len(left.Items) != 1 {
		t.Errorf("its lease stays: %v, %v", left.Items, err)
	}
	// An orderly stop gives the lease up.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.Run(ctx)
	if left, err = client.CoordinationV1().Leases("ns").List(t.Context(), meta.ListOptions{}); err != nil || len(left.Items) != 0 {
		t.Errorf("the lease stays after a stop: %v, %v", left.Items, err)
	}
}

// Replicas know of each other whatever their clocks say, and none deletes the lease of
// another that runs. One that has started anew counts a dead one for one more lease.
func TestReplicasWhoseClocksDiffer(t *testing.T) {
	for _, ahead := range []time.Duration{time.Minute, 2 * time.Hour} {
		t.Run(ahead.String(), func(t *testing.T) {
			client := fake.NewClientset()
			now := time.Now()
			told := map[string][]string{}
			replica := func(address string, ahead time.Duration) *Replicas {
				return &Replicas{
					Client: kubeapitest.Of(client), Namespace: "ns", Driver: "d", Self: address, Now: func() time.Time { return now.Add(ahead) },
					Tell: func(a []string) { told[address] = a },
				}
			}
			a, b := replica("10.0.0.1:9808", ahead), replica("10.0.0.2:9808", 0)
			both := []string{a.Self, b.Self}
			leases := func() int {
				left, err := client.CoordinationV1().Leases("ns").List(t.Context(), meta.ListOptions{})
				must(t, err)
				return len(left.Items)
			}
			must(t, a.round(t.Context()))
			must(t, b.round(t.Context()))
			for range 10 {
				now = now.Add(replicaEvery)
				must(t, a.round(t.Context()))
				if !slices.Equal(told[a.Self], both) || leases() != 2 {
					t.Fatalf("the one ahead tells %v, and left %d leases", told[a.Self], leases())
				}
				must(t, b.round(t.Context()))
				if !slices.Equal(told[b.Self], both) || leases() != 2 {
					t.Fatalf("the one behind tells %v, and left %d leases", told[b.Self], leases())
				}
			}
			a = replica(a.Self, ahead) // and b is no more
			for passed := time.Duration(0); passed <= replicaGone; passed += replicaEvery {
				must(t, a.round(t.Context()))
				want := both
				if passed >= replicaLease {
					want = both[:1]
				}
				if !slices.Equal(told[a.Self], want) || leases() != 2 {
					t.Fatalf("%s after its end: told %v, %d leases", passed, told[a.Self], leases())
				}
				now = now.Add(replicaEvery)
			}
			must(t, a.round(t.Context()))
			if leases() != 1 {
				t.Error("its lease stays")
			}
		})
	}
}

// made is a Certificates under test, with a clock.
type made struct {
	*Certificates

	client *fake.Clientset
	clock  time.Time
}

func newMade(client *fake.Clientset, clock time.Time) *made {
	m := &made{client: client, clock: clock}
	m.Certificates = &Certificates{
		Client: kubeapitest.Of(client), Namespace: "ns", Secret: "s", ConfigMap: "c", ServerName: link.DefaultName, Now: func() time.Time { return m.clock },
	}
	return m
}

// bundle is what nodes accept.
func (m *made) bundle(t *testing.T) *x509.CertPool {
	t.Helper()
	cm, err := m.client.CoreV1().ConfigMaps("ns").Get(t.Context(), "c", meta.GetOptions{})
	must(t, err)
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(cm.Data[CAKey])) {
		t.Fatal("no certificate in the ConfigMap")
	}
	return pool
}

func (m *made) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	c, err := m.Get()
	must(t, err)
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	must(t, err)
	return leaf
}

func (m *made) verify(t *testing.T, roots *x509.CertPool) error {
	t.Helper()
	_, err := m.leaf(t).Verify(x509.VerifyOptions{Roots: roots, DNSName: link.DefaultName, CurrentTime: m.clock})
	return err
}

// Over years of rotations, a node that has read the ConfigMap within the last day
// accepts the certificate that is shown, and nothing is renewed without need.
func TestRotation(t *testing.T) {
	m := newMade(fake.NewClientset(), time.Now())
	if _, err := m.Get(); err == nil {
		t.Fatal("a certificate before there is one")
	}
	var yesterday *x509.CertPool
	leaves, issuers := map[string]bool{}, map[string]bool{}
	for day := range 3 * 365 {
		must(t, m.Ensure(t.Context()))
		for what, pool := range map[string]*x509.CertPool{"today's": m.bundle(t), "yesterday's": yesterday} {
			if pool == nil {
				continue
			}
			if err := m.verify(t, pool); err != nil {
				t.Fatalf("day %d: %s bundle: %v", day, what, err)
			}
		}
		leaves[m.leaf(t).SerialNumber.String()], issuers[m.leaf(t).Issuer.String()] = true, true
		yesterday = m.bundle(t)
		m.clock = m.clock.Add(24 * time.Hour)
	}
	if len(leaves) > 70 || len(issuers) < 3 || len(issuers) > 5 {
		t.Errorf("%d certificates of %d CAs in 3 years", len(leaves), len(issuers))
	}
	// After a long sleep everything is expired, and made anew.
	m.clock = m.clock.Add(5 * 365 * 24 * time.Hour)
	must(t, m.Ensure(t.Context()))
	must(t, m.verify(t, m.bundle(t)))
}

// Replicas that start at once agree on one certificate.
func TestReplicasAgree(t *testing.T) {
	client := fake.NewClientset()
	all := make([]*made, 8)
	var wg sync.WaitGroup
	for i := range all {
		all[i] = newMade(client, time.Now())
		wg.Go(func() {
			if err := all[i].Ensure(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, m := range all {
		must(t, m.Ensure(t.Context()))
		must(t, m.verify(t, all[0].bundle(t)))
		if m.leaf(t).SerialNumber.Cmp(all[0].leaf(t).SerialNumber) != 0 {
			t.Error("two certificates")
		}
	}
}

// A replica that loses the race for a renewal takes what the winner made.
func TestLostRenewal(t *testing.T) {
	client := fake.NewClientset()
	// The winner has a client of its own: the loser's is locked while it is called.
	other := &fake.Clientset{}
	other.AddReactor("*", "*", clienttesting.ObjectReaction(client.Tracker()))
	loser, winner := newMade(client, time.Now()), newMade(other, time.Now())
	must(t, loser.Ensure(t.Context()))
	loser.clock = loser.clock.Add(caLife - caRenew + time.Hour)
	winner.clock = loser.clock
	raced := false
	client.PrependReactor("update", "secrets", func(clienttesting.Action) (bool, runtime.Object, error) {
		if raced {
			return false, nil, nil
		}
		raced = true
		if err := winner.Ensure(t.Context()); err != nil {
			t.Error(err)
		}
		return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "secrets"}, "s", errors.New("it was changed"))
	})
	must(t, loser.Ensure(t.Context()))
	if loser.leaf(t).SerialNumber.Cmp(winner.leaf(t).SerialNumber) != 0 {
		t.Error("two certificates")
	}
	secret, err := client.CoreV1().Secrets("ns").Get(t.Context(), "s", meta.GetOptions{})
	must(t, err)
	cm, err := client.CoreV1().ConfigMaps("ns").Get(t.Context(), "c", meta.GetOptions{})
	must(t, err)
	if cm.Data[CAKey] != string(secret.Data[CAKey])+string(secret.Data[caNext+CAKey]) {
		t.Error("nodes accept what the loser made")
	}
	must(t, loser.verify(t, loser.bundle(t)))
}

// What is damaged, or for another name, is made anew.
func TestDamagedSecret(t *testing.T) {
	for key, value := range map[string]string{CAKey: "x", caKeyKey: "", core.TLSCertKey: "x", core.TLSPrivateKeyKey: "x", caNext + CAKey: "x"} {
		client := fake.NewClientset()
		m := newMade(client, time.Now())
		must(t, m.Ensure(t.Context()))
		secret, err := client.CoreV1().Secrets("ns").Get(t.Context(), "s", meta.GetOptions{})
		must(t, err)
		secret.Data[key] = []byte(value)
		_, err = client.CoreV1().Secrets("ns").Update(t.Context(), secret, meta.UpdateOptions{})
		must(t, err)
		again := newMade(client, time.Now())
		must(t, again.Ensure(t.Context()))
		if err := again.verify(t, again.bundle(t)); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
}

func TestDir(t *testing.T) {
	m := newMade(fake.NewClientset(), time.Now())
	must(t, m.Ensure(t.Context()))
	dir := t.TempDir()
	get := Dir(dir)
	if _, err := get(); err == nil {
		t.Fatal("a certificate out of nothing")
	}
	secret, err := m.client.CoreV1().Secrets("ns").Get(t.Context(), "s", meta.GetOptions{})
	must(t, err)
	write := func(key string, b []byte) { must(t, os.WriteFile(filepath.Join(dir, key), b, 0o600)) }
	write(core.TLSCertKey, secret.Data[core.TLSCertKey])
	write(core.TLSPrivateKeyKey, secret.Data[core.TLSPrivateKeyKey])
	first, err := get()
	must(t, err)
	if again, err := get(); err != nil || again != first {
		t.Error("read anew without need", err)
	}
	write(core.TLSCertKey, []byte("half"))
	if again, err := get(); err != nil || again != first {
		t.Error("a half-written file replaces a good one", err)
	}
	ca, err := newCA(time.Now())
	must(t, err)
	other, err := ca.issue("x", time.Now())
	must(t, err)
	write(core.TLSCertKey, other.certPEM)
	write(core.TLSPrivateKeyKey, other.keyPEM)
	if next, err := get(); err != nil || next == first {
		t.Error("not read anew", err)
	}
}

func TestClaims(t *testing.T) {
	csi := func(driver, id string) core.PersistentVolumeSpec {
		return core.PersistentVolumeSpec{PersistentVolumeSource: core.PersistentVolumeSource{CSI: &core.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: id}}}
	}
	client := fake.NewClientset(
		&core.PersistentVolumeClaim{ObjectMeta: meta.ObjectMeta{Namespace: "a", Name: "x", UID: "u1"}},
		&core.PersistentVolumeClaim{ObjectMeta: meta.ObjectMeta{Namespace: "b", Name: "x", UID: "u2"}, Spec: core.PersistentVolumeClaimSpec{VolumeName: "pv"}},
		&core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: "pv"}, Spec: csi("csi-loop.io", "p.v")},
		&core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: "other"}, Spec: csi("other.io", "p.w")},
		&core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: "host"}},
	)
	refs, err := (&Claims{Client: kubeapitest.Of(client), Driver: "csi-loop.io"}).References(t.Context())
	must(t, err)
	if !maps.Equal(refs.Claims, map[string]string{"u1": "", "u2": "pv"}) || !maps.Equal(refs.PVs, map[string]string{"pv": "p.v", "other": "", "host": ""}) {
		t.Errorf("%+v", refs)
	}
	for _, resource := range []string{"persistentvolumes", "persistentvolumeclaims"} {
		client := fake.NewClientset()
		client.PrependReactor("list", resource, func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, errors.New("no") })
		if _, err := (&Claims{Client: kubeapitest.Of(client)}).References(t.Context()); err == nil {
			t.Errorf("%s that cannot be read are none", resource)
		}
	}
}
