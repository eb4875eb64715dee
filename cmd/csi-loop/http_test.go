package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// tooLong is how long a test waits for what does not come.
const tooLong = 20 * time.Second

// listens serves the HTTP endpoint with at most three connections, and dials it.
func listens(t *testing.T, change func(*http.Server)) (dial func(request string) net.Conn) {
	t.Helper()
	srv := newHTTPServer(newMetrics(build{}).handler(), 3)
	change(srv)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return func(request string) net.Conn {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(tooLong)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, request); err != nil {
			t.Fatal(err)
		}
		return conn
	}
}

// closes reads what the connection says until the other end closes it.
func closes(t *testing.T, conn net.Conn) string {
	t.Helper()
	said, err := io.ReadAll(conn)
	if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // it is not wrapped
		t.Fatalf("the connection stays, after %q", said)
	}
	return string(said)
}

const ask = "GET /healthz HTTP/1.1\r\nHost: x\r\n"

// What a connection does not say keeps nothing for it.
func TestIdleConnectionsAreClosed(t *testing.T) {
	dial := listens(t, func(srv *http.Server) { srv.ReadHeaderTimeout, srv.ReadTimeout = time.Second, time.Second })
	if said := closes(t, dial(ask+"\r\n")); !strings.Contains(said, "200 OK") {
		t.Errorf("%q", said)
	}
	closes(t, dial(ask+"Content-Length: 10\r\n\r\n"))
	closes(t, dial(ask))
}

// Whoever has many connections keeps nobody from asking.
func TestTheOldestConnectionIsClosed(t *testing.T) {
	dial := listens(t, func(srv *http.Server) { srv.ReadHeaderTimeout, srv.ReadTimeout = 2*tooLong, 2*tooLong })
	var silent []net.Conn
	for range 5 {
		silent = append(silent, dial(ask))
	}
	if said := closes(t, dial(ask+"\r\n")); !strings.Contains(said, "200 OK") {
		t.Errorf("%q", said)
	}
	for _, conn := range silent[:3] {
		closes(t, conn)
	}
	// The youngest have their place.
	for _, conn := range silent[3:] {
		if _, err := io.WriteString(conn, "\r\n"); err != nil {
			t.Error(err)
		}
		if said := closes(t, conn); !strings.Contains(said, "200 OK") {
			t.Errorf("%q", said)
		}
	}
}

// blocking is a metric that waits.
type blocking func()

func (blocking) Describe(chan<- *prometheus.Desc) {}
func (b blocking) Collect(chan<- prometheus.Metric) {
	b()
}

// Reports and metrics are made for a few at a time.
func TestFewRequestsAtOnce(t *testing.T) {
	m := newMetrics(build{})
	come, leave := make(chan struct{}), make(chan struct{})
	wait := func() { come <- struct{}{}; <-leave }
	m.registry.MustRegister(blocking(wait))
	m.reports(func(context.Context) (report.Cluster, error) { wait(); return report.Cluster{}, nil })
	h := m.handler()
	for _, path := range []string{"/report", "/metrics"} {
		codes := make(chan int, httpAtOnce+1)
		request := func() {
			code, _ := get(t, h, path)
			codes <- code
		}
		for range httpAtOnce {
			go request()
			<-come
		}
		go request()
		select {
		case code := <-codes:
			if code != http.StatusServiceUnavailable {
				t.Errorf("%s: %d", path, code)
			}
		case <-come:
			t.Errorf("%s: there is no bound", path)
			leave <- struct{}{}
			<-codes
		}
		for range httpAtOnce {
			leave <- struct{}{}
			if code := <-codes; code != http.StatusOK {
				t.Errorf("%s: %d", path, code)
			}
		}
	}
}
