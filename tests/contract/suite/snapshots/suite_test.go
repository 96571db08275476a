// SPDX-License-Identifier: Apache-2.0

// Package snapshots asks a snapshotter on a unix socket what containerd's own test suite asks of containerd's snapshotters.
package snapshots

import (
	"context"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

// Environment variables: the socket, and the snapshotter's name where containerd listens on it.
const (
	socketVariable = "SNAPSHOTTER_SOCKET"
	nameVariable   = "SNAPSHOTTER_NAME"
)

// TestSnapshotter runs the suite. All its tests share the one snapshotter behind the socket, as they do where
// containerd runs them against a daemon: each has names of its own.
func TestSnapshotter(t *testing.T) {
	socket := os.Getenv(socketVariable)
	if socket == "" {
		t.Fatalf("%s is not set", socketVariable)
	}
	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() }) // the suite's tests are parallel: they end after this function
	client := snapshotsapi.NewSnapshotsClient(connection)
	testsuite.SnapshotterSuite(t, "Proxy", func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		return proxy.NewSnapshotter(client, os.Getenv(nameVariable)), nil, nil
	})
}
