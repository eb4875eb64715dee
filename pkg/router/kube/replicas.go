package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	coordination "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

const (
	// replicaLabel marks the leases of replicas; its value is the driver's name.
	replicaLabel = "csi-loop.io/link-of"
	// replicaEvery is how often a replica renews its lease and looks for others.
	replicaEvery = 10 * time.Second
	// replicaLease is how long a lease counts without being seen to be renewed.
	replicaLease = 40 * time.Second
	// replicaGone is after how long of the same the lease of a replica that is no more
	// is deleted.
	replicaGone = time.Hour
)

// Replicas tells the controller's replicas of each other: each has a Lease whose
// holder is the address where nodes reach it.
type Replicas struct {
	Client    kubeapi.Interface
	Namespace string
	Driver    string
	// Self is this replica's address.
	Self string
	// Tell is called with the addresses of all replicas, when they may have changed.
	Tell func(addresses []string)
	// Now is the clock; nil is time.Now.
	Now func() time.Time

	seen map[string]sighting // by the name of a lease
}

// sighting is a lease as this replica saw it.
type sighting struct {
	renewed time.Time // by the clock of its holder
	since   time.Time // when that was seen first, by the clock of this replica
}

// Run keeps this replica's lease, and looks for others, until ctx ends. Then it
// gives the lease up, so that nodes stop looking for it.
func (r *Replicas) Run(ctx context.Context) {
	if r.Now == nil {
		r.Now = time.Now
	}
	for {
		if err := r.round(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Cannot look for other replicas; trying again")
		}
		if sleep(ctx, replicaEvery) != nil {
			break
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := r.Client.Leases(r.Namespace).Delete(ctx, r.name(), meta.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		klog.FromContext(ctx).Error(err, "Cannot give up the lease")
	}
}

// name is that of this replica's lease.
func (r *Replicas) name() string {
	sum := sha256.Sum256([]byte(r.Driver + "\x00" + r.Self))
	return "csi-loop-link-" + hex.EncodeToString(sum[:8])
}

func (r *Replicas) round(ctx context.Context) error {
	leases := r.Client.Leases(r.Namespace)
	renewErr := r.renew(ctx)
	all, err := leases.List(ctx, meta.ListOptions{LabelSelector: replicaLabel + "=" + r.Driver})
	if err != nil {
		return errors.Join(renewErr, err)
	}
	addresses, seen, now := []string{r.Self}, make(map[string]sighting, len(all.Items)), r.Now()
	for _, l := range all.Items {
		if l.Spec.HolderIdentity == nil || l.Spec.RenewTime == nil {
			continue
		}
		// The holder's clock may be another than this one's. So its time is compared with
		// itself only, and what is new to this replica counts from now.
		s, ok := r.seen[l.Name]
		if !ok || !s.renewed.Equal(l.Spec.RenewTime.Time) {
			s = sighting{renewed: l.Spec.RenewTime.Time, since: now}
		}
		seen[l.Name] = s
		age := now.Sub(s.since)
		switch {
		case age < replicaLease:
			addresses = append(addresses, *l.Spec.HolderIdentity)
		case age > replicaGone:
			renewErr = errors.Join(renewErr, ignoreNotFound(leases.Delete(ctx, l.Name, meta.DeleteOptions{})))
		}
	}
	r.seen = seen
	slices.Sort(addresses)
	r.Tell(slices.Compact(addresses))
	return renewErr
}

// renew makes or renews the lease.
func (r *Replicas) renew(ctx context.Context) error {
	leases := r.Client.Leases(r.Namespace)
	now, seconds := meta.NewMicroTime(r.Now()), int32(replicaLease/time.Second)
	lease, err := leases.Get(ctx, r.name(), meta.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordination.Lease{
			ObjectMeta: meta.ObjectMeta{Name: r.name(), Labels: map[string]string{replicaLabel: r.Driver}},
			Spec:       coordination.LeaseSpec{HolderIdentity: &r.Self, RenewTime: &now, LeaseDurationSeconds: &seconds},
		}, meta.CreateOptions{})
		return err
	}
	if err != nil {
		return err
	}
	lease.Spec.HolderIdentity, lease.Spec.RenewTime, lease.Spec.LeaseDurationSeconds = &r.Self, &now, &seconds
	_, err = leases.Update(ctx, lease, meta.UpdateOptions{})
	return err
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
